"""Data sets of the Hub: downloaded once, or read from the cache where the Hub cannot be reached."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from hub.access import ask, download, refused
from settings.schema import RunError, SettingsError

log = logging.getLogger(__name__)


def data_builder(key: str, name: str) -> Any:
    """A `datasets` builder of the Hub's data set `name`, its files downloaded.

    Where the Hub cannot be reached, it is what an earlier run has read.

    Raises:
        SettingsError, RunError: as `model_folder`.
    """
    from datasets import load_dataset_builder

    try:
        info = ask(key, name, "dataset")
    except (OfflineModeIsEnabled, RunError) as error:
        with offline():
            try:
                builder = last_builder(name)
            except (OSError, ValueError) as missing:
                if isinstance(error, RunError):
                    raise error from missing
                raise SettingsError(f"{key}: no such local file or folder, and not in the cache ({error})") from error
        log.warning("%s: taken from the cache as it is; %s", key, error)
        return builder
    with refused(key, name, "dataset"):
        builder = load_dataset_builder(name, revision=info.sha)
    mark, files = f"datasets/{name}@{info.sha}/", []
    for file in [str(file) for split in (builder.config.data_files or {}).values() for file in split]:
        if "://" not in file:  # a repository's README could name them, and so make this machine read its own files
            raise SettingsError(f"{key}: it names a file of this machine, {file}")
        files += [file.partition(mark)[2]] if mark in file else []
    download(key, name, "dataset", info, files)
    return builder


def last_builder(name: str) -> Any:
    """The data set `name` as it was read last on this machine."""
    from datasets import config, load_dataset_builder
    from datasets.naming import camelcase_to_snakecase

    try:
        return load_dataset_builder(name)
    except ValueError:  # perhaps because it has several configurations
        owner, _, last = name.rpartition("/")
        folder = "___".join(filter(None, [owner, camelcase_to_snakecase(last)]))
        kept = list(Path(config.HF_DATASETS_CACHE).glob(f"{folder}/*/*/*/"))
        if not kept:
            raise
        return load_dataset_builder(name, max(kept, key=lambda read: read.stat().st_mtime).parts[-3])


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let `datasets` look only into its cache, at once, instead of trying the network several times."""
    import datasets

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
