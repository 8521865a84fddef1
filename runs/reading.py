"""What run folders say of their runs, whatever became of them, and in which settings the runs differ."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runs.runfolder import ERROR_FILE, METRICS_FILE, RESULTS_FILE
from settings.resume import RESUME, SETTINGS_FILE
from utils import read_json_lines, totals_so_far

COMPLETE, FAILED, INTERRUPTED = "complete", "failed", "interrupted"


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    folder: Path
    status: str
    error: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """The settings that its command line changed, and their values."""


def read_run(folder: Path) -> Run:
    """The run in `folder`, whatever became of it; what cannot be read is taken for missing."""
    metrics, facts = read_lines(folder / METRICS_FILE), read_object(folder / RESULTS_FILE)
    said = read_text(folder / ERROR_FILE).strip()
    status = COMPLETE if facts else FAILED if said else INTERRUPTED
    noted = read_object(folder / SETTINGS_FILE).get("overrides")
    facts = facts or totals_so_far(metrics)
    if "bytes_up" in facts:
        facts["bytes"] = facts["bytes_up"] + facts["bytes_down"]
    overrides = noted if isinstance(noted, list) else hydras_overrides(folder / ".hydra" / "overrides.yaml")
    return Run(folder, status, said, facts, metrics, as_settings(overrides))


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_object(file: Path) -> dict[str, Any]:
    with suppress(ValueError):
        content = json.loads(read_text(file))
        return content if isinstance(content, dict) else {}
    return {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl."""
    with suppress(OSError):
        return [
            line for line in read_json_lines(file) if isinstance(line, dict) and {"round", "train_loss"} <= set(line)
        ]
    return []


def hydras_overrides(file: Path) -> list[str]:
    try:
        return list(OmegaConf.load(file))  # type: ignore[arg-type]
    except (OSError, YAMLError, OmegaConfBaseException, TypeError):
        return []


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
    return ", ".join(f"{names[key]}={one_line(run.settings[key], 40)}" for key in keys if key in run.settings)


def one_line(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def cell(text: str) -> str:
    """`text` inside a Markdown table."""
    return one_line(text, 160).replace("\\", "\\\\").replace("|", "\\|")
