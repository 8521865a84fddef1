"""Which clients take part in a round, drawn from (seed, round) by partition id, so that they are the same in every run;
and what ends a run before its last round: bytes that are spent (`strategy.max_bytes`), a loss that stops falling.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf
from typing import Any

from settings.schema import RunConfig, share_of
from utils import bytes_sent, generator, held_out_losses

Ids = Collection[int]  # of partitions


def num_training(config: RunConfig, num_clients: int) -> int:
    """Clients that train in a round: `fraction_fit` of the `num_clients` there, and no fewer than are needed."""
    sampling = config.sampling
    return min(num_clients, max(1, sampling.min_replies, share_of(num_clients, sampling.fraction_fit)))


def sample(partitions: Iterable[int], count: int, *key: str | int) -> list[int]:
    """`count` of the partition ids, drawn without replacement from the generator of `key`, sorted."""
    drawn = generator(*key).choice(sorted(partitions), size=count, replace=False)
    return sorted(int(partition) for partition in drawn)


def choose(here: Ids, count: int, *key: str | int, retry: int = 0, good: Ids = (), dropped: Ids = ()) -> list[int]:
    """The partition ids of `count` clients that take part, of those that are `here`.

    In a retry, as many as are missing besides the `good` ones; those that were `dropped` are asked again only
    if there are too few others.
    """
    there = set(here)
    count = min(count, len(there))
    if not retry:
        return sample(there, count, *key)
    others, missing = there - set(good), count - len(set(good))
    fresh = others - set(dropped)
    chosen = sample(fresh, min(missing, len(fresh)), *key, retry)
    again = others - fresh
    return sorted(chosen + sample(again, min(missing - len(chosen), len(again)), *key, retry, "again"))


class BudgetSpent(Exception):
    """The next messages would exceed `strategy.max_bytes`."""


class Budget:
    """Bytes of adapters that a run may still send, down and up."""

    def __init__(self, config: RunConfig, payload_bytes: int) -> None:
        self.config, self.payload_bytes = config, payload_bytes
        self.most = inf if config.sampling.max_bytes is None else config.sampling.max_bytes

    def left(self, metrics: Sequence[Mapping[str, Any]], traffic: Mapping[str, int]) -> float:
        """Bytes that neither a recorded round nor the `traffic` since then has used."""
        return self.most - sum(map(bytes_sent, metrics)) - sum(traffic.values())

    def of_round(self, round_number: int, num_clients: int, num_training: int) -> int:
        """Bytes of a round in which no client fails, when `num_clients` are there."""
        evaluating = self.config.evaluations_after(round_number, num_clients)
        return self.payload_bytes * (2 * num_training + evaluating)

    def check(self, round_number: int, num_clients: int, num_training: int, left: float) -> None:
        """Raise BudgetSpent if so many clients cannot train any more, and others evaluate what comes of it."""
        wanted = self.of_round(round_number, num_clients, num_training)
        if wanted > left:
            there = f"strategy.max_bytes={self.most:.10g}: {left:.10g} bytes are left"
            raise BudgetSpent(f"{there}, round {round_number} would take {wanted}")

    def ends_after(self, round_number: int, num_clients: int, left: float) -> bool:
        """Whether a round's adapter is the final one for want of bytes, and there are enough left to measure it."""
        next_round = self.of_round(round_number + 1, num_clients, num_training(self.config, num_clients))
        measured = bool(self.config.dataset.eval_name) and round_number > 0
        return measured and self.payload_bytes <= left < next_round


def no_better(config: RunConfig, round_number: int, metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a run ends here, by `train.early_stop_rounds`; None if it goes on, or it is no round to measure."""
    losses, patience = held_out_losses(metrics), config.train.early_stop_rounds
    due = bool(config.sampling.fraction_evaluate) or config.evaluates_after(round_number)
    best = min(losses, key=losses.__getitem__, default=round_number)
    if patience is None or not due or round_number - best < patience:
        return None
    when = f"after round {best}" if best else "before the first round"
    return f"train.early_stop_rounds={patience}: the held-out loss was lowest {when}"
