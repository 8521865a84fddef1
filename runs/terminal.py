"""Standard output and error that never end a run: what cannot be written there is dropped; main.log has it."""

import io
import os
import sys
from typing import Any


class Steady(io.FileIO):
    """A file that takes whatever comes, also when nothing can be written (a reader that is gone, a full device)."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def keep_output() -> None:
    """Make this process's standard streams steady, also those that were closed, or cannot write every letter."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)  # None where it was closed
        if stream is getattr(sys, f"__{name}__"):  # and not one that a notebook or a test has put there
            by_line, at_once = not stream or stream.line_buffering, bool(stream and stream.write_through)
            raw, encoding = Steady(number, "w", closefd=False), stream.encoding if stream else None
            file: Any = raw if at_once else io.BufferedWriter(raw)  # PYTHONUNBUFFERED: what is said is there at once
            setattr(sys, name, io.TextIOWrapper(file, encoding, "backslashreplace", None, by_line, at_once))
