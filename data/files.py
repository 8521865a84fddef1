"""Which files hold the rows of a split: of a folder, of a repository of the Hub, or of what `datasets` saved."""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, NoReturn

import yaml
from datasets.data_files import SPLIT_KEYWORDS, sanitize_patterns
from fsspec.utils import glob_translate
from huggingface_hub import metadata_load

from settings.schema import DatasetConfig, SettingsError

KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
PACKED = (".gz", ".zst")
ABOUT = (  # of data sets, not their rows
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"
)  # fmt: skip
CARD = "README.md"
SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
SHARD = re.compile(r"(?P<split>(?!(data|part)-).+)-\d{5}-of-\d{5}(-\w+)?")  # as on the Hub; `save_to_disk` writes data-


def kind_of(path: PurePath) -> str | None:
    """What reads a file of this name, whatever it is packed in; None if nothing does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return KINDS.get(next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), ""))


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def holds_rows(path: PurePath) -> bool:
    """Whether a file can: hidden ones, and those that tell of a data set, cannot."""
    return kind_of(path) is not None and path.name not in ABOUT and not any(map(is_hidden, path.parts))


def data_files(cfg: DatasetConfig, names: Iterable[str], card: Path, in_splits: bool) -> tuple[str, list[str]]:
    """The kind of the files that hold the rows of `dataset.split`, and these files in the order of their names.

    Args:
        names: all files of a folder or repository, relative to it. card: its README.md.
        in_splits: as on the Hub, files whose names say nothing are the split train if no name says so, beside files
            that are numbered with their split nothing else has rows, and of several kinds most are of the right one.

    Raises:
        SettingsError: without the data set's name, if there are none, or several kinds.
    """
    paths = sorted(path for path in map(PurePath, names) if holds_rows(path))
    files = listed_in_card(cfg, paths, configs_of(card), in_splits) or of_split(paths, cfg.split, in_splits)
    if in_splits and files:
        kinds = Counter(map(kind_of, files))
        usual = max(kinds, key=lambda kind: (kinds[kind], kind == "parquet"))
        files = [file for file in files if kind_of(file) == usual]
    return one_kind(files), [file.as_posix() for file in files]


def local_files(cfg: DatasetConfig, path: Path) -> tuple[str, dict[Path, str]]:
    """The same of a file, or of a folder of this machine: each with how it is called in messages."""
    if path.is_file():
        return one_kind([path]), {path: path.name}
    if files := saved_files(path, cfg.split):
        return one_kind(files), {file: file.relative_to(path).as_posix() for file in files}
    kind, names = data_files(cfg, names_below(path), path / CARD, in_splits=False)
    return kind, {path / name: name for name in names}


def one_kind(files: Collection[PurePath]) -> str:
    kinds = {kind_of(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        found = f" (here are {', '.join(sorted(filter(None, kinds)))})" if len(kinds) > 1 else ""
        raise SettingsError(f"use a file, or a folder of files of one kind, out of {', '.join(KINDS)}{found}")
    return str(kinds.pop())


def names_below(folder: Path) -> Iterator[str]:
    """Files that are not hidden, in sub-folders and linked ones too, each folder once.

    A link to nothing, or a sub-folder that cannot be read, is refused: their rows would be missed.
    """

    def refuse(error: OSError) -> NoReturn:
        raise SettingsError(f"{error.filename} cannot be read ({error.strerror})") from error

    known = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        is_new = (here := Path(root).resolve()) not in known
        known.add(here)
        folders[:] = [name for name in sorted(folders) if is_new and not is_hidden(name)]
        for file in (Path(root, name) for name in names if is_new):
            name = file.relative_to(folder)
            if file.is_file():
                yield name.as_posix()
            elif file.is_symlink() and not file.exists() and holds_rows(name):
                raise SettingsError(f"{name} is a link to a file that is not there")


def saved_files(folder: Path, split: str) -> list[Path]:
    """The files of a folder that `datasets.save_to_disk` wrote, as it lists them; none if it did not."""
    try:
        if (several := folder / "dataset_dict.json").is_file():
            splits = json.loads(several.read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise SettingsError(f"dataset.split={split}: it has {', '.join(splits)}")
            folder = folder / split
        elif not (folder / "dataset_info.json").is_file():
            return []
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / PurePath(entry["filename"]).name for entry in state["_data_files"]]
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise error if isinstance(error, SettingsError) else SettingsError(f"cannot be read ({error})") from error


def of_split(paths: Collection[PurePath], split: str, in_splits: bool) -> list[PurePath]:
    """The files of this split, if names of files or of their folders say of which they are; otherwise all."""
    named = {path: split_named(path) for path in paths}
    said = {*filter(None, named.values())}
    if not in_splits and len(said) < 2:
        return list(named)
    shards = {path: name for path, name in named.items() if in_splits and SHARD.fullmatch(stem(path))}
    is_train = not (in_splits and "train" in said)  # what says nothing
    named = shards or {path: name or "train" for path, name in named.items() if name or is_train}
    found = {*filter(None, named.values())}
    chosen = [path for path, name in named.items() if name == (split if split in found else SPLITS.get(split, split))]
    if found and not chosen:
        raise SettingsError(f"dataset.split={split}: it has files of {', '.join(sorted(found))}; choose one of them")
    return chosen


def stem(path: PurePath) -> str:
    return path.name.partition(".")[0]


def split_named(path: PurePath) -> str | None:
    """The split that a relative path names: `train_sft` for train_sft-00000-of-00003.parquet, `test` for test.jsonl."""
    if shard := SHARD.fullmatch(stem(path)):
        return SPLITS.get(shard["split"], shard["split"])
    for part in reversed(path.parts):
        if found := next((SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLITS), None):
            return found
    return None


def listed_in_card(
    cfg: DatasetConfig, paths: Collection[PurePath], configs: Collection[dict[str, Any]], in_splits: bool
) -> list[PurePath]:
    """The files that the `configs` of a README.md list for a split; none if there are no configs."""
    if not configs:
        if cfg.subset not in (None, "", "default"):
            raise SettingsError(f"dataset.subset={cfg.subset}: its README.md lists no configurations")
        return []
    chosen = [config for config in configs if config.get("config_name") == cfg.subset]
    if not cfg.subset:
        chosen = [c for c in configs if c.get("default") or c.get("config_name") == "default"] or [*configs]
    if len(chosen) != 1:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        raise SettingsError(f"dataset.subset={cfg.subset or 'null'}: {cfg.name} has {names}; choose one")
    folder, splits = chosen[0]["data_dir"], chosen[0]["data_files"]
    if splits and cfg.split not in splits:
        raise SettingsError(f"dataset.split={cfg.split}: {cfg.name} has {', '.join(splits)}")
    if not splits:
        found = of_split([path for path in paths if path.is_relative_to(folder)], cfg.split, in_splits)
    else:
        found = [path for path in paths if any(pattern.match(path.as_posix()) for pattern in splits[cfg.split])]
    if in_splits and not found:
        raise SettingsError(
            f"dataset.split={cfg.split}: its README.md lists no file for it that is there and is one of "
            f"{', '.join(KINDS)}"
        )
    return found


def configs_of(card: Path) -> list[dict[str, Any]]:
    """The configurations of a dataset card, with folder, and patterns by split or none; none if it is no such card."""
    try:
        configs: list[dict[str, Any]] = metadata_load(card)["configs"]
        for config in configs:
            config["data_dir"] = folder = PurePath(config.get("data_dir") or "")
            named = sanitize_patterns(config.get("data_files") or {})
            config["data_files"] = {
                key: [re.compile(glob_translate((folder / pattern).as_posix())) for pattern in patterns]
                for key, patterns in named.items()
            }
        return configs
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError, RecursionError):
        return []
