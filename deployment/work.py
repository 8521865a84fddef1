"""What a node makes of a message: the settings checked, the handler called, its failure put into words.

`python -m deployment.work FD` is a node's resident worker, see deployment/resident.py. Imports nothing heavy before the
first run's settings say which GPUs this process sees.
"""

import os
import shutil
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from deployment.acceptance import place_of
from deployment.resident import Answer
from exchange.faults import failure_of
from exchange.folding import folded, unfolded
from machine import gpus
from utils import SUITE_FOLDER, quick_imports, quiet_libraries

PRIVATE_FOLDER = "FLOWERTUNE_PRIVATE"  # in the environment: what a node's rows become on disk, for its user alone
OWN_PATHS = ("dataset", "eval", "model", "cache", "keep", "policy")  # of a node's config


def answered(name: str, overrides: str, node: Mapping[str, Any], content: Any) -> Answer:
    """What this node makes of a message's content: its handler `name` of deployment/handlers.py.

    `overrides` is the run-config of the server's run.
    """
    try:
        place = place_of(overrides, tuple(sorted(node.items())))
        with quick_imports():
            from deployment.handlers import HANDLERS

        quiet_libraries()
        content = unfolded(content) if content else content
        return Answer(folded(HANDLERS[name](place, content)))
    except Exception as error:  # whatever it is, the server must learn of it
        own = [str(node[key]) for key in OWN_PATHS if key in node]
        return Answer(None, *failure_of(error, [*own, str(SUITE_FOLDER), str(Path.home())]))


def sees_its_gpus(overrides: str, node: Mapping[str, Any]) -> bool:
    """Let this process see the first of the node's GPUs, or none if the run's clients train on the CPU.

    Returns False if that cannot be any more, because libraries have looked, and seen others.
    """
    try:
        num_gpus = place_of(overrides, tuple(sorted(node.items()))).config.client_resources.num_gpus
    except Exception:  # `answered` says what is not accepted, and nothing has to be seen for that
        return True
    wanted = gpus.first() if num_gpus else []
    if has_looked():
        return os.environ.get(gpus.VARIABLE) == ",".join(wanted)
    gpus.show(wanted)
    return True


def has_looked() -> bool:
    """Whether libraries of this process can have looked for GPUs: what they saw stays."""
    return "torch" in sys.modules


def serve(connection: Connection) -> None:
    """Answer one request after the other until the node closes its end; None if it takes a process with other GPUs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's business
    signal.signal(signal.SIGTERM, leave)
    while True:
        try:
            name, overrides, node, content = connection.recv()
            fits = sees_its_gpus(overrides, node)
            connection.send(answered(name, overrides, node, content) if fits else None)
        except (EOFError, BrokenPipeError):
            leave()


def leave(*_: object) -> None:
    if folder := os.environ.get(PRIVATE_FOLDER):  # in case that the node was killed
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
