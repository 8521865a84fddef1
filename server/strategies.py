"""Flower's strategies, as `strategy` names them, and the one of `baseline=alone`."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import hydra
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from hydra.utils import get_class

from exchange.transfer import to_record
from model import Adapter
from settings.schema import RunConfig, RunError, SamplingConfig, SettingsError, check_keywords
from utils import shortened

log = logging.getLogger(__name__)

# arguments of Flower's strategies that let each take every client that it is shown
EVERYONE = {"fraction_train": 1.0, "fraction_evaluate": 1.0}
EVERYONE |= dict.fromkeys(("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), 1)
KEYS = ("weighted_by_key", "arrayrecord_key", "configrecord_key")


def make_strategy(config: RunConfig) -> Strategy:
    """The Flower strategy that `strategy._target_` names, set to take every client that it is shown.

    Raises SettingsError for a class that does not exist or is no strategy, and for arguments that do not fit.
    """
    key = f"strategy._target_={config.strategy['_target_']}"
    try:
        chosen = get_class(config.strategy["_target_"])
    except Exception as error:
        raise SettingsError(f"{key}: there is no such class") from error
    if "ClientSide" in chosen.__name__:
        raise SettingsError(f"{key}: clips on the clients, which is not built in; use its server-side twin")
    if not issubclass(chosen, Strategy):
        raise SettingsError(f"{key}: not a message-based Flower strategy (flwr.serverapp.strategy)")
    own = {entry.name for entry in dataclasses.fields(SamplingConfig)}
    arguments = {name: value for name, value in config.strategy.items() if name not in own}
    decided = dict.fromkeys(EVERYONE, "set strategy.fraction_fit")
    decided |= dict.fromkeys(KEYS, "clients answer with Flower's names")
    check_keywords("strategy", arguments, chosen, decided)
    try:
        strategy: Strategy = hydra.utils.instantiate(arguments)
    except Exception as error:
        raise SettingsError(f"strategy: {chosen.__name__} refuses its arguments ({shortened(error, 200)})") from error
    for part in (strategy, getattr(strategy, "strategy", None)):  # the differential-privacy strategies wrap another
        for name, value in EVERYONE.items():
            if hasattr(part, name):
                setattr(part, name, value)
    return strategy


def aggregate(strategy: Strategy, round_number: int, replies: Sequence[tuple[int, Message]], like: Adapter) -> Adapter:
    """The next adapter, with the tensors of `like`, as the strategy makes it of checked replies.

    It takes their partition ids for those of nodes. Raises RunError if it makes none, or not one of finite numbers.
    """
    name = type(strategy).__name__
    for partition, reply in replies:
        reply.metadata.__dict__["_src_node_id"] = partition
    try:
        arrays, _ = strategy.aggregate_train(round_number, [reply for _, reply in replies])
    except Exception as error:
        log.exception("%s", name)
        raise RunError(f"round {round_number}: {name} cannot aggregate {len(replies)} replies: {error}") from error
    if arrays is None:
        raise RunError(f"round {round_number}: {name} made no adapter of {len(replies)} replies")
    adapter = {tensor: arrays[tensor].numpy().astype(np.float32) for tensor in sorted(like)}
    if not all(np.isfinite(value).all() for value in adapter.values()):
        raise RunError(f"round {round_number}: {name} made an adapter of numbers that are not finite")
    return adapter


class Alone(FedAvg):
    """Every client continues with the adapter that it returned last, and evaluates that one: no federation.

    What it aggregates, and so every checkpoint, is FedAvg's average of all; nobody trains on it.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.own: dict[str, np.ndarray] = {}  # by node and tensor, in a form that a checkpoint can keep

    def _construct_messages(self, record: RecordDict, node_ids: list[int], message_type: str) -> list[Message]:
        """As FedAvg, for training and evaluation alike; to each node its own adapter, the first time the `record`'s."""
        messages = []
        for node in node_ids:
            keys = {name: f"{node}/{name}" for name in record.array_records["arrays"]}
            own = {name: self.own[key] for name, key in keys.items() if key in self.own}
            content = RecordDict(dict(record) | ({"arrays": to_record(own)} if own else {}))
            messages.append(Message(content, node, message_type))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            for name, array in next(iter(reply.content.array_records.values())).items():
                self.own[f"{reply.metadata.src_node_id}/{name}"] = array.numpy()
        return super().aggregate_train(server_round, replies)
