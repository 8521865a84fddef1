"""Flower's strategies, as `strategy` names them, and the one of `baseline=alone`."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import hydra
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from hydra.utils import get_class

from exchange.transfer import to_record
from model import Adapter
from settings.schema import RunConfig, RunError, SamplingConfig, SettingsError, check_keywords
from utils import shortened

log = logging.getLogger(__name__)


def make_strategy(config: RunConfig) -> Strategy:
    """The Flower strategy that `strategy._target_` names, set to take every client that it is shown.

    Raises:
        SettingsError: for a class that does not exist or is no strategy, and for arguments that do not fit.
    """
    target = config.strategy["_target_"]
    try:
        chosen = get_class(target)
    except Exception as error:
        raise SettingsError(f"strategy._target_={target}: there is no such class") from error
    if "ClientSide" in chosen.__name__:
        raise SettingsError(
            f"strategy._target_={target}: clips on the clients, which is not built in; use its server-side twin"
        )
    if not issubclass(chosen, Strategy):
        raise SettingsError(
            f"strategy._target_={target}: not a message-based Flower strategy (flwr.serverapp.strategy)"
        )
    own = {entry.name for entry in dataclasses.fields(SamplingConfig)}
    arguments = {key: value for key, value in config.strategy.items() if key not in own}
    decided = {
        "fraction_train": "set strategy.fraction_fit",
        **dict.fromkeys(("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), "set strategy.fraction_fit"),
        **dict.fromkeys(
            ("weighted_by_key", "arrayrecord_key", "configrecord_key"), "clients answer with Flower's names"
        ),
    }
    check_keywords("strategy", arguments, chosen, decided)
    try:
        strategy: Strategy = hydra.utils.instantiate(arguments)
    except Exception as error:
        raise SettingsError(f"strategy: {chosen.__name__} refuses its arguments ({shortened(error, 200)})") from error
    for part in (strategy, getattr(strategy, "strategy", None)):  # the differential-privacy strategies wrap another
        for name in ("fraction_train", "fraction_evaluate"):
            if hasattr(part, name):
                setattr(part, name, 1.0)
        for name in ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"):
            if hasattr(part, name):
                setattr(part, name, 1)
    return strategy


def aggregate(
    strategy: Strategy,
    round_number: int,
    replies: Sequence[tuple[int, Message]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Adapter:
    """The next adapter, as the strategy makes it of checked replies.

    Args:
        replies: by partition id, which the strategy takes for the id of the node.

    Raises:
        RunError: if it makes none, or not one of finite numbers.
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
    adapter = {tensor: arrays[tensor].numpy().astype(np.float32) for tensor in sorted(shapes)}
    if not all(np.isfinite(value).all() for value in adapter.values()):
        raise RunError(f"round {round_number}: {name} made an adapter of numbers that are not finite")
    return adapter


class ShownNodes:
    """A Grid on which a strategy sees only the clients that were sampled for this round, by their partition ids.

    Flower's node ids are random in every run; a strategy may keep something for each.
    """

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        self._grid, self._node_ids = grid, list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._node_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class Alone(FedAvg):
    """Every client continues with the adapter that it returned last, and evaluates that one: no federation.

    What it aggregates, and so every checkpoint, is FedAvg's average of all; nobody trains on it.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.own: dict[str, np.ndarray] = {}  # by node and tensor, in a form that a checkpoint can keep

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.with_own(super().configure_train(server_round, arrays, config, grid), arrays)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.with_own(super().configure_evaluate(server_round, arrays, config, grid), arrays)

    def with_own(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        """`messages`, each with the adapter of its client; the first time `arrays`."""
        addressed = []
        for message in messages:
            node = message.metadata.dst_node_id
            own = {name: self.own[f"{node}/{name}"] for name in arrays if f"{node}/{name}" in self.own}
            content = RecordDict(dict(message.content) | ({"arrays": to_record(own)} if own else {}))
            addressed.append(Message(content, node, message.metadata.message_type))
        return addressed

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            for name, array in next(iter(reply.content.array_records.values())).items():
                self.own[f"{reply.metadata.src_node_id}/{name}"] = array.numpy()
        return super().aggregate_train(server_round, replies)
