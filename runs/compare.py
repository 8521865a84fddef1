"""python -m runs.compare FOLDER ... [--output=FOLDER]: run folders, or folders of them, as one table and one picture.

Writes sweep.csv (plain numbers), sweep.md (for people) and train_loss.png. A sweep does it by itself when it
ends: `SweepReport` is Hydra's callback for that, set in conf/config.yaml.
"""

import argparse
import csv
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from runs import baselines
from runs.plots import plot_comparison
from runs.reading import COMPLETE, Run, cell, differing, find_runs, label, read_text, run_folders
from utils import bytes_text, seconds_text

DRY_RUN = re.compile(r"\+{0,2}dry_run=(true|yes|on|1)", re.IGNORECASE)
NUMBERS: dict[str, tuple[str, Callable[[Any], str]]] = {  # column -> (key of results.json, how people read it)
    "final loss": ("final_train_loss", "{:.4f}".format),
    "best loss": ("best_train_loss", "{:.4f}".format),
    "held-out loss": ("held_out_loss", "{:.4f}".format),
    "rounds": ("rounds", str),
    "bytes": ("bytes", bytes_text),
    "seconds": ("seconds", seconds_text),
    "peak memory": ("peak_memory_bytes", bytes_text),
}


def report(runs: Sequence[Run], output: Path) -> list[str]:
    """Write sweep.csv, sweep.md, train_loss.png and, of baselines, their table into `output`; returns the names."""
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
    written = ["sweep.csv", "sweep.md"]
    if curves:
        plot_comparison(curves, output / "train_loss.png")
        written.append("train_loss.png")
    if "baseline" in keys and baselines.report(runs, output):
        written += ["baselines.csv", "baselines.md", "baselines.png"]
    return written


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of their paths as tells them apart."""
    whole = [folder.resolve() for folder in folders]
    if len({path.name for path in whole}) == len(whole):
        return [path.name for path in whole]
    common = Path(os.path.commonpath(whole))
    return [str(path.relative_to(common)) for path in whole]


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
        if any(DRY_RUN.fullmatch(override) for override in config.hydra.overrides.task):
            return
        SweepReport.failed = True  # until it is known better
        folder = Path(config.hydra.sweep.dir)
        runs = find_runs([folder])
        done = sum(run.status == COMPLETE for run in runs)
        written = report(runs, folder)
        show(folder, written, "baselines.md")
        also = " and train_loss.png" if "train_loss.png" in written else ""
        print(f"sweep: {done} of {len(runs)} runs complete; see {folder / 'sweep.md'}{also}", flush=True)
        SweepReport.failed = done < len(runs)


def is_job(folder: Path) -> bool:
    """Whether a run belongs to a sweep: there a job that failed has its line too."""
    return (folder.parent / "multirun.yaml").exists()


def show(folder: Path, written: Sequence[str], *names: str) -> None:
    """Print those of the files `names` in `folder` that were just `written`."""
    for name in names:
        print(read_text(folder / name) if name in written else "", end="")


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
        found = find_runs(options.folders)
        runs = [run for run in found if run.metrics or run.folder in options.folders or is_job(run.folder)]
        written = report(runs, options.output)
    except OSError as error:
        print(f"error: --output={options.output}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    show(options.output, written, "sweep.md", "baselines.md")
    if left_out := len(found) - len(runs):
        print(f"left out: {left_out} folders of dry runs, and of runs that ended before a round", file=sys.stderr)
    print(f"written: {', '.join(written)} in {options.output.resolve()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
