"""A node's resident worker: one process beside the node's own that keeps base model, rows and trainer between messages.

The two share one pair of sockets that no other process has. The worker ends with the node, however that ends.
"""

import ctypes
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from exchange.faults import WORKER_DIED
from utils import SUITE_FOLDER

LOOK_S, END_S = 10.0, 5.0  # between two looks at whether a message is still wanted; for the worker to leave
EARLY_S, MOST_EARLY_DEATHS = 15.0, 3
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Answer:
    """What a handler made of a message: its content, or an error."""

    content: Any = None
    code: int = 0
    told: str = ""
    """Of an error: what may leave this node."""
    whole: str = ""
    """Of an error: everything, for this node's own terminal and log."""


class GivenUp(Exception):
    """A message that was not answered, because it took too long or nobody waits for it any more."""


class Died(Exception):
    """The worker ended in the middle of a message."""


class ResidentWorker:
    """The worker as its node sees it. Use as a context manager."""

    command = (sys.executable, "-m", "deployment.work")

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.early_deaths = 0

    def __enter__(self) -> "ResidentWorker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        here, there = socket.socketpair()
        with there:
            self.process = subprocess.Popen(
                [*self.command, str(there.fileno())],
                env=self.environment,
                cwd=SUITE_FOLDER,
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                preexec_fn=end_with_parent,  # noqa: PLW1509
            )
        self.connection, self.started = Connection(here.detach()), time.monotonic()

    def restart(self) -> None:
        """Replace a worker that is of no use any more. Raises Died if it dies again and again as soon as it starts."""
        is_early = self.process.poll() is not None and time.monotonic() - self.started < EARLY_S
        self.early_deaths = self.early_deaths + 1 if is_early else 0
        self.process.kill()
        self.process.wait()
        self.connection.close()
        if self.early_deaths == MOST_EARLY_DEATHS:
            raise Died("the worker dies as soon as it starts; its reason is above")
        self.start()

    def ask(self, request: tuple[Any, ...], most_s: float, unwanted: Callable[[], bool]) -> Answer:
        """The worker's answer to a `request`, which are the arguments of `answered`.

        A worker that cannot see the GPUs of the run (it answers None) is replaced by one that can, and one that says
        that it is of no use any more by another.

        Raises GivenUp after `most_s` seconds, or as soon as it is `unwanted`, and Died if the worker died; then it is
        another one.
        """
        deadline = time.monotonic() + most_s
        while True:
            try:
                self.connection.send(request)
                while not self.connection.poll(max(0.0, min(LOOK_S, deadline - time.monotonic()))):
                    late = time.monotonic() >= deadline
                    if late or unwanted():
                        self.restart()
                        raise GivenUp(f"given up after {most_s:g} s" if late else "nobody waits for it any more")
                answer: Answer | None = self.connection.recv()
            except (EOFError, OSError) as error:
                self.restart()
                raise Died("the worker died while it worked on this message; another one is started") from error
            if answer is None or answer.code == WORKER_DIED:
                self.restart()
            if answer:
                return answer


def end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when the node's own is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
