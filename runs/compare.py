"""python -m runs.compare FOLDER ... [--output=FOLDER]: run folders, or folders of them, as one table and one picture.

Writes sweep.csv (plain numbers), sweep.md (for people) and train_loss.png. A sweep does it by itself when it
ends: `SweepReport` is Hydra's callback for that, set in conf/config.yaml.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from runs.reading import COMPLETE, Run, differing, find_runs, label, markdown, read_text, run_folders
from utils import bytes_text, seconds_text

if TYPE_CHECKING:
    import pandas as pd

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
    from runs import baselines  # with pandas, which main.py should not wait for
    from runs.plots import plot_comparison

    keys, names, written = differing(runs), names_of(runs), ["sweep.csv", "sweep.md"]
    output.mkdir(parents=True, exist_ok=True)
    table_of(runs, names, keys, plain=True).to_csv(output / "sweep.csv", index=False)
    table = table_of(runs, names, keys, plain=False)
    (output / "sweep.md").write_text(markdown(table.columns, table.to_numpy()), encoding="utf-8")
    labels = [label(run, keys) for run in runs]
    curves = [
        (text if text and labels.count(text) == 1 else f"{name} {text}".strip(), run.metrics)
        for name, text, run in zip(names, labels, runs, strict=True)
        if run.metrics
    ]
    if curves:
        plot_comparison(curves, output / "train_loss.png")
        written.append("train_loss.png")
    if "baseline" in keys and baselines.report(runs, output):
        written += ["baselines.csv", "baselines.md", "baselines.png"]
    return written


def table_of(runs: Sequence[Run], names: Sequence[str], keys: Sequence[str], *, plain: bool) -> "pd.DataFrame":
    """A row a run: what differs, its numbers, plain or as people read them, and what became of it."""
    import pandas as pd

    columns = {"run": names} | {key: [run.settings.get(key, "") for run in runs] for key in keys}
    for name, (key, text) in NUMBERS.items():
        values = [run.results.get(key) for run in runs]
        columns[name] = ["" if value is None else str(value) if plain else text(value) for value in values]
    columns |= {"status": [run.status for run in runs], "error": [" ".join(run.error.split()) for run in runs]}
    return pd.DataFrame(columns)


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
        show(folder, written, "baselines.md")
        also = " and train_loss.png" if "train_loss.png" in written else ""
        print(f"sweep: {done} of {len(runs)} runs complete; see {folder / 'sweep.md'}{also}", flush=True)
        SweepReport.failed = done < len(runs)


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
        if not any(run_folders(folder)):
            print(f"error: {folder}: no run folder there", file=sys.stderr)
            return 2
    try:
        found = find_runs(options.folders)
        runs = [
            run
            for run in found  # a job of a sweep has its line even if it failed before a round
            if run.metrics or run.folder in options.folders or (run.folder.parent / "multirun.yaml").exists()
        ]
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
