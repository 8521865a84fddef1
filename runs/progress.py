"""What a person sees during a run: a live line on a terminal, a plain line a round elsewhere."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runs.tracking import numbers
from utils import bytes_text, held_out_losses, seconds_text


class RunProgress:
    """The progress of one run. Use as a context manager; output goes to `console`, numbers to `tracker` too."""

    def __init__(self, num_rounds: int, console: Console | None = None, tracker: Any = None) -> None:
        self.console, self.tracker = console or Console(highlight=False), tracker
        self.num_rounds = num_rounds
        self.live = self.console.is_terminal
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("round", total=num_rounds, status="starting the workers")

    def __enter__(self) -> "RunProgress":
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.bar.stop()

    def say(self, message: str) -> None:
        """Say what happens before the first round."""
        if self.live:
            self.bar.update(self.task, status=message)
        else:
            self.console.print(message, soft_wrap=True)

    def resumed(self, round_number: int) -> None:
        """Say that rounds were done before, by a process that was interrupted."""
        self.bar.reset(self.task, completed=round_number, status="starting the workers")
        self.console.print(f"resumed after round {round_number}", soft_wrap=True)

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        if self.tracker:
            self.tracker.log(numbers(record), step=record["round"])
        held_out = held_out_losses([record]).get(record["round"])
        loss = f"loss {record['train_loss']:.4f}" + ("" if held_out is None else f"  held out {held_out:.4f}")
        if self.live:
            self.bar.update(self.task, completed=record["round"], status=f"{loss} lr {record['learning_rate']:.2g}")
            return
        wall = record["seconds"]["wall"]
        left = seconds_text(wall * (self.num_rounds - record["round"]))
        traffic = bytes_text(record["bytes_up"] + record["bytes_down"])
        clients = ",".join(map(str, record["clients"]))
        self.console.print(
            f"round {record['round']}/{self.num_rounds}  {loss}  clients {clients}  "
            f"{record['tokens']} tokens  {traffic}  {wall:.1f}s  left {left}",
            soft_wrap=True,
        )


def summary_line(summary: Mapping[str, Any]) -> str:
    """The end of a run in one line, from what results.json holds."""
    traffic = bytes_text(summary["bytes_down"] + summary["bytes_up"])
    line = (
        f"final loss {summary['final_train_loss']:.4f} after {summary['rounds']} round{'s'[: summary['rounds'] - 1]} "
        f"in {seconds_text(summary['seconds'])}, {traffic} transferred"
    )
    if "held_out_loss" in summary:
        before = "" if summary["held_out_loss_before"] is None else f"{summary['held_out_loss_before']:.4f} before, "
        line += f"\nheld-out loss {before}{summary['held_out_loss']:.4f} after"
        if summary["best_held_out_loss"] >= (summary["held_out_loss_before"] or math.inf):
            line += ": no round was better than the base model"
        elif summary["best_held_out_loss"] < summary["held_out_loss"]:
            line += f", lowest after round {summary['best_round']}: {summary['best_held_out_loss']:.4f}"
    return line + (f"\nended early by {summary['ended']}" if summary["ended"] else "")
