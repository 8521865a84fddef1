"""What a node does for a message: the settings checked, the handler called, its failure put into words.

`python -m deployment.work FD` is a node's resident worker, see deployment/resident.py.
"""

import functools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

import client
from client import Site
from deployment import handover, limits
from deployment.acceptance import accepted
from deployment.resident import Answer
from exchange.faults import failure_of
from exchange.folding import folded, unfolded
from settings.policy import Policy, read_policy
from utils import SUITE_FOLDER, quiet_libraries

PRIVATE_FOLDER = "FLOWERTUNE_PRIVATE"  # in the environment: what a node's rows become on disk, for its user alone
OWN_PATHS = ("dataset", "eval", "model", "cache", "keep", "policy")  # of a node's config


@dataclass(frozen=True)
class Place:
    """Where a message is answered: a run's settings as this node accepts them, and what is the node's own."""

    site: Site
    policy: Policy
    node: Mapping[str, Any]
    """The node's config, as deployment/launchers.py makes it."""

    @property
    def partition_id(self) -> int:
        return int(self.node["partition-id"])


def answered(name: str, overrides: str, node: Mapping[str, Any], content: Any) -> Answer:
    """What this node makes of a message's content: its handler `name` of HANDLERS.

    Args:
        overrides: the run-config of the server's run.
    """
    quiet_libraries()
    try:
        content = unfolded(content) if content else content
        return Answer(folded(HANDLERS[name](place_of(overrides, tuple(sorted(node.items()))), content)))
    except Exception as error:  # whatever it is, the server must learn of it
        own = [str(node[key]) for key in OWN_PATHS if key in node]
        return Answer(None, *failure_of(error, [*own, str(SUITE_FOLDER), str(Path.home())]))


@functools.lru_cache(maxsize=1)
def place_of(overrides: str, node: tuple[tuple[str, Any], ...]) -> Place:
    """Raises SettingsError for what this node does not accept."""
    facts = dict(node)
    policy = read_policy(Path(facts["policy"]) if "policy" in facts else None)
    config, own_rows = accepted(overrides, facts, policy)
    return Place(Site(config, own_rows, is_resident="resident" in facts), policy, facts)


def handle(name: str, place: Place, content: Any) -> RecordDict:
    return client.handle(name, place.site, content, place.partition_id)


def describe(place: Place, content: Any) -> RecordDict:
    """The client's introduction, with what a site adds to it."""
    reply = handle("describe", place, content)
    facts: Any = reply["client"]
    if "loading" not in facts:
        worker = client.resident_worker(place.site)
        limits.check_adapter_of(worker, place.policy)
        limits.check_count(int(facts["num-rows"]), place.policy)
        for key, value in limits.introduction(worker, place.node, place.partition_id).items():
            facts[key] = value
    return reply


def train(place: Place, content: Any) -> RecordDict:
    worker = client.resident_worker(place.site)
    limits.check_adapter_of(worker, place.policy)
    limits.check_arrays(worker, content)
    limits.check_training(worker, place.policy, content, place.partition_id)
    return handle("train", place, content)


def evaluate(place: Place, content: Any) -> RecordDict:
    worker = client.resident_worker(place.site)
    limits.check_adapter_of(worker, place.policy)
    limits.check_arrays(worker, content)
    limits.check_evaluation(worker, place.policy, content, place.partition_id)
    return limits.without_few_answers(handle("evaluate", place, content), place.policy)


def initial(place: Place, content: Any) -> RecordDict:
    limits.check_adapter_of(client.resident_worker(place.site), place.policy)
    return handle("initial", place, content)


def final(place: Place, content: Any) -> RecordDict:
    worker = client.resident_worker(place.site)
    limits.check_adapter_of(worker, place.policy)
    return handover.kept(worker, place.node, content)


def losses(place: Place, content: Any) -> RecordDict:
    """What this node tells its own owner at the end; never sent."""
    return handover.losses(client.resident_worker(place.site), place.partition_id)


HANDLERS: dict[str, Callable[[Place, Any], RecordDict]] = {
    "describe": describe,
    "initial": initial,
    "train": train,
    "evaluate": evaluate,
    "final": final,
    "losses": losses,
}


def serve(connection: Connection) -> None:
    """Answer one request after the other until the node closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's business
    signal.signal(signal.SIGTERM, leave)
    while True:
        try:
            connection.send(answered(*connection.recv()))
        except (EOFError, BrokenPipeError):
            leave()


def leave(*_: object) -> None:
    if folder := os.environ.get(PRIVATE_FOLDER):  # in case that the node was killed
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
