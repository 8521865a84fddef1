"""python compare.py FOLDER ... [--output=FOLDER]: run folders, or folders of them, as one table and one picture.

Writes sweep.csv (plain numbers), sweep.md (for people) and train_loss.png. A sweep does it by itself when it
ends: `SweepReport` is Hydra's callback for that, set in conf/config.yaml.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from utils import bytes_text, plot_comparison, read_json_lines, seconds_text

ERROR_FILE = "error.txt"
COMPLETE, FAILED, INTERRUPTED = "complete", "failed", "interrupted"
NUMBERS: dict[str, tuple[str, Callable[[Any], str]]] = {  # column -> (key of results.json, how people read it)
    "final loss": ("final_train_loss", "{:.4f}".format),
    "best loss": ("best_train_loss", "{:.4f}".format),
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
    """The run in `folder`, whatever became of it."""
    results, error, metrics = folder / "results.json", folder / ERROR_FILE, folder / "metrics.jsonl"
    lines = read_json_lines(metrics) if metrics.exists() else []
    facts = json.loads(results.read_text(encoding="utf-8")) if results.exists() else so_far(lines)
    said = error.read_text(encoding="utf-8").strip() if error.exists() else ""
    status = COMPLETE if results.exists() else FAILED if said else INTERRUPTED
    return Run(folder, status, said, facts | {"bytes": facts.get("bytes_down", 0) + facts.get("bytes_up", 0)}, lines,
               read_settings(folder / ".hydra"))  # fmt: skip


def so_far(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results.json would say of an unfinished run, as far as its rounds tell."""
    if not metrics:
        return {}
    losses = [line["train_loss"] for line in metrics]
    totals = {name: sum(line[name] for line in metrics) for name in ("bytes_down", "bytes_up")}
    return totals | {
        "rounds": len(metrics),
        "final_train_loss": losses[-1],
        "best_train_loss": min(losses),
        "seconds": sum(line["seconds"]["wall"] for line in metrics),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in metrics),
    }


def read_settings(folder: Path) -> dict[str, str]:
    """Key and value of each override that Hydra noted down."""
    file = folder / "overrides.yaml"
    overrides = OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else []
    pairs = (str(override).lstrip("+~").partition("=") for override in overrides or [])
    return {key: value.strip("'\"") for key, _, value in pairs}


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`: each is a run folder, or holds some. In the order of their names, 2 before 10."""
    return [read_run(folder) for given in folders for folder in run_folders(given)]


def run_folders(folder: Path) -> Iterator[Path]:
    if (folder / ".hydra").is_dir() or (folder / "metrics.jsonl").exists():
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
    """What tells this run from the others: `quantization=4, seed=1`, or the folder's name."""
    shown = [f"{key.rpartition('.')[2]}={shorten(run.settings[key])}" for key in keys if key in run.settings]
    return ", ".join(shown) or run.folder.name


def shorten(value: str) -> str:
    return value if len(value) <= 30 else f"...{value[-27:]}"


def report(runs: Sequence[Run], output: Path) -> None:
    """Write sweep.csv, sweep.md and train_loss.png into `output`."""
    keys = differing(runs)
    output.mkdir(parents=True, exist_ok=True)
    header = ["run", *keys, *NUMBERS, "status", "error"]
    with (output / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(row(run, keys, plain=True) for run in runs)])
    lines = [header, ["---"] * len(header), *(row(run, keys, plain=False) for run in runs)]
    table = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    (output / "sweep.md").write_text(table, encoding="utf-8")
    curves = {}
    for run in runs:
        if run.metrics:
            name = label(run, keys)
            curves[name if name not in curves else f"{name} ({run.folder.name})"] = run.metrics
    if curves:
        plot_comparison(curves, output / "train_loss.png")


def row(run: Run, keys: Sequence[str], *, plain: bool) -> list[str]:
    """A line of the table: plain numbers, or as people read them."""
    numbers = []
    for key, text in NUMBERS.values():
        value = run.results.get(key) if run.metrics else None
        numbers.append("" if value is None else str(value) if plain else text(value))
    error = " ".join(run.error.split())
    settings = [run.settings.get(key, "") for key in keys]
    return [run.folder.name, *settings, *numbers, run.status, error if plain else shorten_end(error)]


def shorten_end(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."


class SweepReport(Callback):
    """Reports a sweep when it ends, and remembers whether a job failed, whatever process it ran in."""

    failed = False

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        runs = find_runs([folder])
        if not any(run.metrics or run.error for run in runs):  # plans only
            return
        done = sum(run.status == COMPLETE for run in runs)
        SweepReport.failed = done < len(runs)
        report(runs, folder)
        print(f"sweep: {done} of {len(runs)} runs complete; see {folder / 'sweep.md'} and train_loss.png", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a run folder, or a folder of them")
    parser.add_argument("--output", type=Path, default=Path("."), help="where to write; default: here")
    options = parser.parse_args()
    runs = find_runs(options.folders)
    if not runs:
        print(f"error: {' '.join(map(str, options.folders))}: no run folder there", file=sys.stderr)
        return 2
    report(runs, options.output)
    print((options.output / "sweep.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
