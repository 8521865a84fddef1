"""What a person sees during a run: a live line on a terminal, a plain line a round elsewhere, numbers in a tracker."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from settings.resume import flat
from settings.schema import RunConfig, SettingsError
from utils import bytes_sent, bytes_text, held_out_losses, seconds_text


class RunProgress(Progress):
    """The progress of one run. Use as a context manager; output goes to `console`, numbers to `tracker` too.

    Messages are printed as they are: what looks like markup or an emoji of rich may be the name of a folder.
    """

    def __init__(self, num_rounds: int, console: Console | None = None, tracker: Any = None) -> None:
        console = console or Console(highlight=False)
        self.tracker, self.num_rounds = tracker, num_rounds
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.add_task("round", total=num_rounds, status="starting the workers")

    def say(self, message: str) -> None:
        """Say what happens before the first round."""
        self.update(self.task, status=message)
        if self.disable:
            self.console.out(message)

    def resumed(self, round_number: int) -> None:
        """Say that rounds were done before, by a process that was interrupted."""
        self.reset(self.task, completed=round_number, status="starting the workers")
        self.console.out(f"resumed after round {round_number}")

    def warn(self, message: str) -> None:
        self.console.out(f"warning: {message}", style="yellow")

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        number = record["round"]
        if self.tracker:
            self.tracker.log(numbers(record), step=number)
        held_out = held_out_losses([record]).get(number)
        loss = f"loss {record['train_loss']:.4f}" + ("" if held_out is None else f"  held out {held_out:.4f}")
        self.update(self.task, completed=number, status=f"{loss} lr {record['learning_rate']:.2g}")
        if not self.disable:
            return
        wall, clients = record["seconds"]["wall"], ",".join(map(str, record["clients"]))
        self.console.out(
            f"round {number}/{self.num_rounds}  {loss}  clients {clients}  {record['tokens']} tokens  "
            f"{bytes_text(bytes_sent(record))}  {wall:.1f}s  left {seconds_text(wall * (self.num_rounds - number))}"
        )


def summary_line(summary: Mapping[str, Any]) -> str:
    """The end of a run in one line, from what results.json holds."""
    line = (
        f"final loss {summary['final_train_loss']:.4f} after {summary['rounds']} round{'s'[: summary['rounds'] - 1]} "
        f"in {seconds_text(summary['seconds'])}, {bytes_text(bytes_sent(summary))} transferred"
    )
    if "held_out_loss" in summary:
        before = "" if summary["held_out_loss_before"] is None else f"{summary['held_out_loss_before']:.4f} before, "
        line += f"\nheld-out loss {before}{summary['held_out_loss']:.4f} after"
        if summary["best_held_out_loss"] >= (summary["held_out_loss_before"] or math.inf):
            line += ": no round was better than the base model"
        elif summary["best_held_out_loss"] < summary["held_out_loss"]:
            line += f", lowest after round {summary['best_round']}: {summary['best_held_out_loss']:.4f}"
    return line + (f"\nended early by {summary['ended']}" if summary["ended"] else "")


def start_tracker(config: RunConfig, folder: Path) -> Any:
    """The tracker that `tracker` names, started; None for none. Raises SettingsError if its package is missing."""
    if config.tracker is None:
        return None
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState(cpu=True)  # the trackers ask it whether they are the main process
    if config.tracker not in [str(name.value) for name in get_available_trackers()]:
        raise SettingsError(f"tracker={config.tracker}: its package is not installed; pip install {config.tracker}")
    chosen = LOGGER_TYPE_TO_CLASS[config.tracker]
    place = {"logging_dir": str(folder)} if chosen.requires_logging_directory else {}
    tracker = chosen("" if place else "llm-flowertune", **place)
    tracker.start()
    if not place:  # TensorBoard would make two folders of it
        settings = dict(flat(asdict(config), lists=False))
        tracker.store_init_configuration({k: v for k, v in settings.items() if isinstance(v, int | float | str)})
    return tracker


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a line of metrics.jsonl a tracker can draw: no client, and no category, whose name could be anything."""
    found = {key: value for key, value in flat(record, lists=False) if isinstance(value, int | float)}
    return {key: value for key, value in found.items() if not re.search(r"\.by_category\.|\.\d+$", key)}
