"""What ends a run before its last round: bytes that are spent (`strategy.max_bytes`), and a loss that stops falling."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.sampling import num_training
from settings.schema import RunConfig
from utils import held_out_losses


class BudgetSpent(Exception):
    """The next messages would exceed `strategy.max_bytes`."""


class Budget:
    """Bytes of adapters that a run may still send, down and up."""

    def __init__(self, config: RunConfig, payload_bytes: int) -> None:
        self.config, self.payload_bytes = config, payload_bytes

    def left(self, metrics: Sequence[Mapping[str, Any]], traffic: Mapping[str, int]) -> float:
        """Bytes that neither a recorded round nor the `traffic` since then has used."""
        most = self.config.sampling.max_bytes
        spent = sum(line["bytes_down"] + line["bytes_up"] for line in metrics) + sum(traffic.values())
        return float("inf") if most is None else most - spent

    def of_round(self, round_number: int, num_clients: int, num_training: int) -> int:
        """Bytes of a round in which no client fails, when `num_clients` are there."""
        evaluating = self.config.evaluations_after(round_number, num_clients)
        return self.payload_bytes * (2 * num_training + evaluating)

    def check(self, round_number: int, num_clients: int, num_training: int, left: float) -> None:
        """Raise BudgetSpent if so many clients cannot train any more, and others evaluate what comes of it."""
        wanted = self.of_round(round_number, num_clients, num_training)
        if wanted > left:
            raise BudgetSpent(
                f"strategy.max_bytes={self.config.sampling.max_bytes:.10g}: {left:.10g} bytes are left, "
                f"round {round_number} would take {wanted}"
            )

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
