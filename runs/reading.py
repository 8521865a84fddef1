"""What run folders say of their runs, whatever became of them; in which settings these differ; their tables."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from runs.runfolder import ERROR_FILE, METRICS_FILE, RESULTS_FILE
from settings.resume import RESUME, SETTINGS_FILE
from utils import bytes_sent, read_json_lines, shortened, totals_so_far

COMPLETE, FAILED, INTERRUPTED = "complete", "failed", "interrupted"


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    folder: Path
    status: str
    error: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)  # that its command line changed


def read_run(folder: Path) -> Run:
    """The run in `folder`, whatever became of it; what cannot be read is taken for missing."""
    metrics, facts = read_lines(folder / METRICS_FILE), parsed(folder / RESULTS_FILE, json.loads, dict)
    said = read_text(folder / ERROR_FILE).strip()
    status = COMPLETE if facts else FAILED if said else INTERRUPTED
    overrides = parsed(folder / SETTINGS_FILE, json.loads, dict).get("overrides")
    if not isinstance(overrides, list):
        overrides = parsed(folder / ".hydra" / "overrides.yaml", safe_load, list)
    facts = facts or totals_so_far(metrics)
    if "bytes_up" in facts:
        facts["bytes"] = bytes_sent(facts)
    return Run(folder, status, said, facts, metrics, as_settings(overrides))


def read_text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")
    return ""


def parsed(file: Path, parse: Callable[[str], Any], kind: type) -> Any:
    """What a file holds, if that can be read and is of this kind; else an empty one."""
    with suppress(ValueError, RecursionError, YAMLError):
        if isinstance(content := parse(read_text(file)), kind):
            return content
    return kind()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, without those that are of something else."""
    lines = []
    with suppress(OSError):
        for line in read_json_lines(file):
            with suppress(AttributeError, KeyError, TypeError, ValueError):
                totals_so_far([line])
                lines.append(line)
    return lines


def as_settings(overrides: Sequence[str]) -> dict[str, str]:
    """Key and value of each override."""
    pairs = (str(override).lstrip("+~").partition("=") for override in overrides if not RESUME.match(str(override)))
    return {key: value.strip("'\"") for key, _, value in pairs}


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`: each is a run folder, or holds some. In the order of their names, 2 before 10."""
    return [read_run(folder) for given in folders for folder in run_folders(given)]


def run_folders(folder: Path) -> Iterator[Path]:
    if (folder / ".hydra").is_dir() or (folder / METRICS_FILE).exists():
        yield folder
    elif folder.is_dir():
        for below in sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name)):
            if below.is_dir():
                yield from run_folders(below)


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]


def label(run: Run, keys: Sequence[str]) -> str:
    """What tells this run from the others: `quantization=4, seed=1`; empty if nothing does."""
    last = [re.split(r"[./]", key)[-1] for key in keys]
    names = {key: key if last.count(end) > 1 else end for key, end in zip(keys, last, strict=True)}
    return ", ".join(f"{names[key]}={shortened(run.settings[key], 40)}" for key in keys if key in run.settings)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], special: str = r"\|") -> str:
    """A table for people. A backslash is put before each of the `special` characters of its cells."""
    escapes = {ord(letter): f"\\{letter}" for letter in special}
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    cells = [[shortened(text, 160).translate(escapes) for text in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
