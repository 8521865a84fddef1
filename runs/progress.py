"""What a person sees during a run: a live line on a terminal, a plain line a round elsewhere."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runs.tracking import numbers
from utils import bytes_sent, bytes_text, held_out_losses, seconds_text


class RunProgress:
    """The progress of one run. Use as a context manager; output goes to `console`, numbers to `tracker` too.

    Messages are printed as they are: what looks like markup or an emoji of rich may be the name of a folder.
    """

    def __init__(self, num_rounds: int, console: Console | None = None, tracker: Any = None) -> None:
        self.console, self.tracker = console or Console(highlight=False), tracker
        self.num_rounds = num_rounds
        self.live = self.console.is_terminal
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("round", total=num_rounds, status="starting the workers")

    def __enter__(self) -> "RunProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, message: str) -> None:
        """Say what happens before the first round."""
        if self.live:
            self.bar.update(self.task, status=message)
        else:
            self.console.out(message)

    def resumed(self, round_number: int) -> None:
        """Say that rounds were done before, by a process that was interrupted."""
        self.bar.reset(self.task, completed=round_number, status="starting the workers")
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
        if self.live:
            self.bar.update(self.task, completed=number, status=f"{loss} lr {record['learning_rate']:.2g}")
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
