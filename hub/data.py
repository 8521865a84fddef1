"""Data sets of the Hub: downloaded once, or read from the cache where the Hub cannot be reached."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hub.access import ask, cached, download, refused
from settings.schema import RunError, SettingsError


class HubData(NamedTuple):
    """A data set of the Hub, on this machine."""

    folder: Path | None
    """Where its files are, if they are JSON or CSV: `datasets` would guess what their cells are."""
    builder: Any
    """Reads the others, which say what their cells are."""


def hub_data(name: str, subset: str | None, has_text: Callable[[Path], bool]) -> HubData:
    """The Hub's data set `name`, in the configuration `subset`, its files downloaded.

    Where the Hub cannot be reached, it is what was read last on this machine.

    Args:
        has_text: whether the wanted rows are in JSON or CSV files of a folder.

    Raises:
        SettingsError, RunError: as `model_folder`.
    """
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    repository = ask(name, "dataset")
    if failure := repository.failure:
        folder = cached(name, "dataset", "main", [])
        if folder and has_text(folder):
            return HubData(folder, None)
        if last := last_builder(name, subset):
            return HubData(None, last)
        if isinstance(failure, RunError):
            raise failure
        raise SettingsError(f"dataset.name={name}: no such local file or folder, and not in the cache ({failure})")
    with refused(name, "dataset"):
        builder = chosen_builder(name, subset, repository.commit)
    mark, files = f"datasets/{name}@{repository.commit}/", []
    for file in [str(file) for split in (builder.config.data_files or {}).values() for file in split]:
        if "://" not in file:  # a repository's README could name them, and so make this machine read its own files
            raise SettingsError(f"dataset.name={name}: it names a file of this machine, {file}")
        files += [file.partition(mark)[2]] if mark in file else []
    if not isinstance(builder, Csv | Json) or not files:
        download(repository, files)
        return HubData(None, builder)
    card = ["README.md"] if "README.md" in repository.sizes else []  # which says what belongs to which split
    return HubData(download(repository, files + card), builder)


def chosen_builder(name: str, subset: str | None, commit: str) -> Any:
    from datasets import get_dataset_config_names, load_dataset_builder

    try:
        return load_dataset_builder(name, subset, revision=commit)
    except ValueError as error:  # which does not say that it is about the configuration
        names = get_dataset_config_names(name, revision=commit)
        if subset in names or (subset is None and len(names) < 2):
            raise
        raise SettingsError(
            f"dataset.subset={'null' if subset is None else subset}: {name} has {', '.join(names)}; choose one"
        ) from error


def last_builder(name: str, subset: str | None) -> Any:
    """What `datasets` has kept of a data set that was read on this machine, in the configuration `subset` if it is set.

    Returns None if it was not read, or is damaged. Asks nobody: `load_dataset_builder` would try the network first.
    """
    from datasets import config
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, _, last = name.rpartition("/")
    folder = "___".join(filter(None, [owner, camelcase_to_snakecase(last)]))
    pattern = f"{folder}/{subset or '*'}/*/*/dataset_info.json"
    kept = [file.parent for file in Path(config.HF_DATASETS_CACHE).glob(pattern)]
    with contextlib.suppress(OSError, ValueError):  # of an empty list, too
        chosen, version, digest = max(kept, key=lambda place: place.stat().st_mtime).parts[-3:]
        return Cache(dataset_name=last, repo_id=name, config_name=chosen, version=version, hash=digest)
    return None
