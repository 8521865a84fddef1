"""python -m runs.compare FOLDER ... [--output=FOLDER]: run folders, or folders of them, as one table and one picture.

Writes sweep.csv (plain numbers), sweep.md (for people) and train_loss.png. A sweep does it by itself when it
ends: `SweepReport` is Hydra's callback for that, set in conf/config.yaml.
"""

import argparse
import csv
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from runs.reading import COMPLETE, Run, differing, find_runs, label, markdown, run_folders
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


def report(runs: Sequence[Run], output: Path) -> dict[str, str]:
    """Write the table, the picture and those of baselines into `output`; returns the names and texts of these files."""
    from runs import baselines  # with pandas, which main.py should not wait for
    from runs.plots import plot_comparison

    keys, names = differing(runs), names_of(runs)
    header = ["run", *keys, *NUMBERS, "status", "error"]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows_of(runs, names, keys, plain=True)])
    written = {"sweep.csv": "", "sweep.md": markdown(header, rows_of(runs, names, keys, plain=False))}
    (output / "sweep.md").write_text(written["sweep.md"], encoding="utf-8")
    labels = [label(run, keys) for run in runs]
    curves = [
        (text if text and labels.count(text) == 1 else f"{name} {text}".strip(), run.metrics)
        for name, text, run in zip(names, labels, runs, strict=True)
        if run.metrics
    ]
    if curves:
        plot_comparison(curves, output / "train_loss.png")
        written["train_loss.png"] = ""
    if "baseline" in keys and (text := baselines.report(runs, output)):
        written |= {"baselines.csv": "", "baselines.md": text, "baselines.png": ""}
    return written


def rows_of(runs: Sequence[Run], names: Sequence[str], keys: Sequence[str], *, plain: bool) -> Iterator[list[str]]:
    """A row a run: what differs, its numbers, plain or as people read them, and what became of it."""
    for name, run in zip(names, runs, strict=True):
        values = [(run.results.get(key), text) for key, text in NUMBERS.values()]
        numbers = ["" if value is None else str(value) if plain else text(value) for value, text in values]
        yield [name, *(run.settings.get(key, "") for key in keys), *numbers, run.status, " ".join(run.error.split())]


def names_of(runs: Sequence[Run]) -> list[str]:
    """The names of the runs' folders, with as much of their paths as tells them apart."""
    folders = [run.folder.resolve() for run in runs]
    if len({folder.name for folder in folders}) == len(folders):
        return [folder.name for folder in folders]
    common = Path(os.path.commonpath(folders))
    return [str(folder.relative_to(common)) for folder in folders]


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
        also = " and train_loss.png" if "train_loss.png" in written else ""
        print(written.get("baselines.md", ""), end="")
        print(f"sweep: {done} of {len(runs)} runs complete; see {folder / 'sweep.md'}{also}", flush=True)
        SweepReport.failed = done < len(runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a run folder, or a folder of them")
    parser.add_argument("--output", type=Path, default=Path("."), help="where to write; default: here")
    options = parser.parse_args()
    for folder in options.folders:
        if not any(run_folders(folder)):
            print(f"error: {folder}: no run folder there", file=sys.stderr)
            return 2
    try:
        found = find_runs(options.folders)
        asked = {*options.folders, *(run.folder for run in found if (run.folder.parent / "multirun.yaml").exists())}
        runs = [run for run in found if run.metrics or run.folder in asked]  # a sweep's job even if it had no round
        written = report(runs, options.output)
    except OSError as error:
        print(f"error: --output={options.output}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(*written.values(), sep="", end="")
    if left_out := len(found) - len(runs):
        print(f"left out: {left_out} folders of dry runs, and of runs that ended before a round", file=sys.stderr)
    print(f"written: {', '.join(written)} in {options.output.resolve()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
