"""Which files a local data set has: a file, or what of a folder holds rows of the split."""

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from settings.schema import SettingsError

KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
PACKED = (".gz", ".zst")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of data sets, not their rows
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-\w+)?")  # as on the Hub


def kind_of(path: Path) -> str | None:
    """What reads a file of this name, whatever it is packed in; None if nothing does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return KINDS.get(next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), ""))


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def data_files(path: Path, split: str, subset: str | None, in_splits: bool = False) -> tuple[str, list[Path]]:
    """The kind of the files that hold the rows of `path`, and these files in the order of their names.

    Args:
        in_splits: a file whose name says nothing belongs to the split train.

    Raises:
        SettingsError: without the setting's name, if there are none, or several kinds.
    """
    files = [path] if path.is_file() else listed_in_card(path, split, subset) or of_split(path, split, in_splits)
    kinds = {kind_of(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        found = f" (here are {', '.join(sorted(filter(None, kinds)))})" if len(kinds) > 1 else ""
        raise SettingsError(f"use a file, or a folder of files of one kind, out of {', '.join(KINDS)}{found}")
    return str(kinds.pop()), files


def files_below(folder: Path) -> Iterator[Path]:
    """Files that can hold rows, in sub-folders too; hidden ones, and those that tell of a data set, cannot.

    Raises:
        SettingsError: for a link to nothing, or a sub-folder that cannot be read: their rows would be missed.
    """
    for file in sorted(seen_below(folder)):
        if kind_of(file) and file.name not in ABOUT:
            if file.is_symlink() and not file.exists():
                raise SettingsError(f"{file.relative_to(folder)} is a link to a file that is not there")
            if file.is_file():
                yield file


def seen_below(folder: Path) -> Iterator[Path]:
    """What is not hidden, in sub-folders and linked ones too, each folder once."""

    def refuse(error: OSError) -> NoReturn:
        raise SettingsError(f"{error.filename} cannot be read ({error.strerror})") from error

    known = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(root).resolve()
        is_new = here not in known
        known.add(here)
        folders[:] = [name for name in sorted(folders) if is_new and name[0] != "." and name != "__MACOSX"]
        yield from (Path(root, name) for name in names if is_new and name[0] != ".")


def of_split(folder: Path, split: str, in_splits: bool) -> list[Path]:
    """The files of this split, if names of files or of their folders say of which they are; otherwise all.

    Raises:
        SettingsError: if they are all of other splits.
    """
    named = {file: split_named(file.relative_to(folder)) for file in files_below(folder)}
    if not in_splits and len({name for name in named.values() if name}) < 2:
        return list(named)
    named = {file: name or "train" for file, name in named.items()}
    found = {*filter(None, named.values())}
    chosen = [file for file, name in named.items() if name == (split if split in found else SPLITS.get(split, split))]
    if not chosen:
        raise SettingsError(f"dataset.split={split}: it has files of {', '.join(sorted(found))}; choose one of them")
    return chosen


def split_named(path: Path) -> str | None:
    """The split that a relative path names: `train_sft` for train_sft-00000-of-00003.parquet, `test` for test.jsonl."""
    if shard := SHARD.fullmatch(path.name.partition(".")[0]):
        return SPLITS.get(shard["split"], shard["split"])
    for part in reversed(path.parts):
        words = re.split(r"[^a-z]+", part.partition(".")[0].lower() if part == path.name else part.lower())
        if found := next((SPLITS[word] for word in words if word in SPLITS), None):
            return found
    return None


def listed_in_card(folder: Path, split: str, subset: str | None) -> list[Path]:
    """The files that the README.md of a repository of the Hub lists for a split; none if it lists none.

    Raises:
        SettingsError: if it has no such configuration or split.
    """
    configs = configs_of(folder / "README.md")
    if not configs:
        if subset:
            raise SettingsError(f"dataset.subset={subset}: this folder's README.md lists no configurations")
        return []
    names = [str(config.get("config_name")) for config in configs]
    chosen = [config for config in configs if config.get("config_name") == subset]
    if not subset:
        chosen = [c for c in configs if c.get("default") or c.get("config_name") == "default"] or configs
    if len(chosen) != 1:
        raise SettingsError(f"dataset.subset={subset}: use one of {', '.join(names)}")
    listed = chosen[0]["data_files"]
    by_split = isinstance(listed, list) and isinstance(listed[0], dict)
    entries = listed if by_split else [{"split": "train", "path": listed}]
    splits = {str(entry["split"]): entry["path"] for entry in entries}
    if split not in splits:
        raise SettingsError(f"dataset.split={split}: use one of {', '.join(splits)}")
    patterns = splits[split] if isinstance(splits[split], list) else [splits[split]]
    below = [(file, file.relative_to(folder).as_posix()) for file in files_below(folder)]
    return [file for file, name in below if any(fnmatch.fnmatch(name, str(pattern)) for pattern in patterns)]


def configs_of(card: Path) -> list[dict[str, Any]]:
    """The configurations with files that a dataset card names in its metadata; none if it is no such card."""
    try:
        metadata = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])
        return [config for config in metadata["configs"] if config["data_files"]]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        return []
