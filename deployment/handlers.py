"""What a node does for each kind of message, within its policy. Imports the model libraries."""

from collections.abc import Callable
from typing import Any

from flwr.app import RecordDict

import client
from client import Site, Worker
from deployment import handover, limits
from deployment.acceptance import Place


def site_of(place: Place) -> Site:
    return Site(place.config, place.own_rows, is_resident="resident" in place.node)


def worker_of(place: Place) -> Worker:
    """This process's worker, if the run trains what the node's policy allows. Raises SettingsError otherwise."""
    worker = client.resident_worker(site_of(place))
    limits.check_adapter_of(worker, place.policy)
    return worker


def handle(name: str, place: Place, content: Any) -> RecordDict:
    return client.handle(name, site_of(place), content, place.partition_id)


def describe(place: Place, content: Any) -> RecordDict:
    """The client's introduction, with what a site adds to it."""
    reply = handle("describe", place, content)
    facts: Any = reply["client"]
    if "loading" not in facts:
        worker = worker_of(place)
        limits.check_count(int(facts["num-rows"]), place.policy)
        for key, value in limits.introduction(worker, place.node, place.partition_id).items():
            facts[key] = value
    return reply


def train(place: Place, content: Any) -> RecordDict:
    worker = worker_of(place)
    limits.check_arrays(worker, content)
    limits.check_training(worker, place.policy, content, place.partition_id)
    return handle("train", place, content)


def evaluate(place: Place, content: Any) -> RecordDict:
    worker = worker_of(place)
    limits.check_arrays(worker, content)
    limits.check_evaluation(worker, place.policy, content, place.partition_id)
    return limits.without_few_answers(handle("evaluate", place, content), place.policy)


def initial(place: Place, content: Any) -> RecordDict:
    worker_of(place)
    return handle("initial", place, content)


def final(place: Place, content: Any) -> RecordDict:
    return handover.kept(worker_of(place), place.node, content)


def losses(place: Place, content: Any) -> RecordDict:
    """What this node tells its own owner at the end; never sent."""
    return handover.losses(worker_of(place), place.partition_id)


HANDLERS: dict[str, Callable[[Place, Any], RecordDict]] = {
    "describe": describe,
    "initial": initial,
    "train": train,
    "evaluate": evaluate,
    "final": final,
    "losses": losses,
}
