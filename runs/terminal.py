"""Standard output and error that never end a run: what cannot be written there is dropped; main.log has it."""

import os
import sys
from contextlib import suppress
from typing import Any


class Steady:
    """A text stream over `stream`; when that fails (a reader that is gone, a full device), the rest goes nowhere."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self.stream.write(text))
        except (OSError, ValueError):
            self.give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.give_up()

    def give_up(self) -> None:
        """Let the stream's file be the null device, so that what is left in its buffer can be written."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_output() -> None:
    """Make this process's standard streams steady, also those that were closed, or cannot write every letter."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: PTH123, SIM115  None where it was closed
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Steady):
            setattr(sys, name, Steady(stream))
