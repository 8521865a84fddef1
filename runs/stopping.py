"""Ctrl-C, SIGTERM and SIGHUP: the first ends a run where nothing is half done, the second ends it at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TWICE_S = 1.0  # `timeout` and Slurm signal a process and its group: within this time that is one request
AGAIN_S = 0.05  # until a signal that was lost in a callback is sent again: the callback is over then
first_s: float | None = None  # when the first signal came
holding = 0  # blocks that let it wait
waiting: list[int] = []


def listen() -> None:
    """From here on the first SIGINT, SIGTERM or SIGHUP raises Stopped, and the next one ends the process."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, stop)
    sys.unraisablehook = once_more


def stop(number: int, _frame: Any) -> None:
    global first_s
    now = time.monotonic()
    if first_s is not None:
        if now - first_s < TWICE_S:
            return
        os._exit(128 + number)  # the workers see that their driver is gone, and leave
    first_s = now
    if not holding:
        raise Stopped(number)
    waiting.append(number)
    with suppress(OSError):  # a reader that is gone
        os.write(2, b"\nstopping as soon as this round is on disk; once more stops at once\n")


def once_more(lost: Any) -> None:
    """Python drops what is raised in a callback, as of a lock of its imports: the signal is sent again after it."""
    global first_s
    if not isinstance(lost.exc_value, Stopped):
        sys.__unraisablehook__(lost)
        return
    first_s = None
    threading.Timer(AGAIN_S, os.kill, (os.getpid(), lost.exc_value.exit_code - 128)).start()


@contextmanager
def held() -> Iterator[None]:
    """A first signal waits until this block has ended; where it fails, its error goes first."""
    global holding
    holding += 1
    try:
        yield
    finally:
        holding -= 1
    if waiting and not holding:
        raise Stopped(waiting.pop())
