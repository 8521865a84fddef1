"""python compare.py FOLDER ... [--output=FOLDER]: run folders, or folders of them, as one table and one picture.

Writes sweep.csv (plain numbers), sweep.md (for people) and train_loss.png. A sweep does it by itself when it
ends: `SweepReport` is Hydra's callback for that, set in conf/config.yaml.
"""

import argparse
import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from plots import plot_comparison
from runfolder import ERROR_FILE, METRICS_FILE, RESULTS_FILE, RESUME, SETTINGS_FILE
from utils import bytes_text, read_json_lines, seconds_text, totals_so_far

FILES = ("sweep.csv", "sweep.md", "train_loss.png", "baselines.csv", "baselines.md", "baselines.png")
COMPLETE, FAILED, INTERRUPTED = "complete", "failed", "interrupted"
NUMBERS: dict[str, tuple[str, Callable[[Any], str]]] = {  # column -> (key of results.json, how people read it)
    "final loss": ("final_train_loss", "{:.4f}".format),
    "best loss": ("best_train_loss", "{:.4f}".format),
    "held-out loss": ("held_out_loss", "{:.4f}".format),
    "rounds": ("rounds", str),
    "bytes": ("bytes", bytes_text),
    "seconds": ("seconds", seconds_text),
    "peak memory": ("peak_memory_bytes", bytes_text),
}


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


def report(runs: Sequence[Run], output: Path) -> None:
    """Write sweep.csv, sweep.md and train_loss.png into `output`."""
    keys, names = differing(runs), names_of([run.folder for run in runs])
    output.mkdir(parents=True, exist_ok=True)
    header = ["run", *keys, *NUMBERS, "status", "error"]
    with (output / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        rows = ([name, *row(run, keys, plain=True)] for name, run in zip(names, runs, strict=True))
        csv.writer(file).writerows([header, *rows])
    lines = [header, ["---"] * len(header)]
    lines += [[name, *row(run, keys, plain=False)] for name, run in zip(names, runs, strict=True)]
    table = "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)
    (output / "sweep.md").write_text(table, encoding="utf-8")
    labels = [label(run, keys) for run in runs]
    curves = [
        (text if text and labels.count(text) == 1 else f"{name} {text}".strip(), run.metrics)
        for name, text, run in zip(names, labels, runs, strict=True)
        if run.metrics
    ]
    if curves:
        plot_comparison(curves, output / "train_loss.png")
    if "baseline" in keys:
        import baselines

        baselines.report(runs, output)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of their paths as tells them apart."""
    whole = [folder.resolve() for folder in folders]
    if len({path.name for path in whole}) == len(whole):
        return [path.name for path in whole]
    common = Path(os.path.commonpath(whole))
    return [str(path.relative_to(common)) for path in whole]


def cell(text: str) -> str:
    """`text` inside a Markdown table."""
    return one_line(text, 160).replace("\\", "\\\\").replace("|", "\\|")


def row(run: Run, keys: Sequence[str], *, plain: bool) -> list[str]:
    """A line of the table behind the run's name: plain numbers, or as people read them."""
    numbers = []
    for key, text in NUMBERS.values():
        value = run.results.get(key)
        numbers.append("" if value is None else str(value) if plain else text(value))
    return [*(run.settings.get(key, "") for key in keys), *numbers, run.status, " ".join(run.error.split())]


class SweepReport(Callback):
    """Reports a sweep when it ends, and remembers whether a job failed, whatever process it ran in."""

    failed = False

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if "dry_run=true" in config.hydra.overrides.task:
            return
        SweepReport.failed = True  # until it is known better
        folder = Path(config.hydra.sweep.dir)
        runs = find_runs([folder])
        done = sum(run.status == COMPLETE for run in runs)
        report(runs, folder)
        print(read_text(folder / "baselines.md"), end="")
        print(f"sweep: {done} of {len(runs)} runs complete; see {folder / 'sweep.md'} and train_loss.png", flush=True)
        SweepReport.failed = done < len(runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a run folder, or a folder of them")
    parser.add_argument("--output", type=Path, default=Path("."), help="where to write; default: here")
    options = parser.parse_args()
    for folder in options.folders:
        if not any(True for _ in run_folders(folder)):
            print(f"error: {folder}: no run folder there", file=sys.stderr)
            return 2
    try:
        report(find_runs(options.folders), options.output)
    except OSError as error:
        print(f"error: --output={options.output}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print((options.output / "sweep.md").read_text(encoding="utf-8"), end="")
    print(read_text(options.output / "baselines.md"), end="")
    written = [name for name in FILES if (options.output / name).exists()]
    print(f"written: {', '.join(written)} in {options.output.resolve()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
