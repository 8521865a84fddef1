"""The strategy of `baseline=alone`: clients that never share what they learned."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from transfer import to_record


class Alone(FedAvg):
    """Every client goes on with the adapter that it returned last, and evaluates that one: no federation.

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
