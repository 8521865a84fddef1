"""What the server accepts of a reply: these tensors, finite float32, plausible numbers, an update of ordinary size."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import Message, MetricRecord

from exchange.scores import FIELDS, LONGEST_NAME, MOST_CATEGORIES, Scores
from model import Adapter
from utils import printable

PARTS = ("load_s", "data_s", "train_s")
TOTALS = ("rows", "tokens", "padded_tokens", "without_response", "refused", "cut", "model_loads", "tokenizations")
MEMORY = ("peak_memory_bytes", "reserved_memory_bytes")
REPORT = frozenset((*PARTS, *TOTALS, *MEMORY, "total_s", "num-examples", "train_loss"))
MOST = 1e12  # of any number that a client reports


def check_reply(reply: Message, shapes: Mapping[str, tuple[int, ...]], num_rows: float = np.inf) -> str | None:
    """Why a training reply cannot be aggregated, or None: nor can one of more rows than its client said it has."""
    fault = check_adapter(reply, shapes) or check_report(reply)
    if fault is None and (examples := metrics_of(reply)["num-examples"]) > num_rows:
        fault = f"num-examples={examples}, but it said that it has {num_rows} rows"
    return fault


def check_adapter(reply: Message, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why the adapter in a reply cannot be used, or None: these tensors, these shapes, finite float32."""
    if reply.has_error():
        return str(reply.error.reason)
    records = list(reply.content.array_records.values())
    if len(records) != 1:
        return f"holds {len(records)} array records, not one"
    if list(records[0]) != sorted(shapes):
        return "holds other tensors than the adapter has"
    for name, array in records[0].items():
        try:
            value = array.numpy()  # what it really holds, whatever its label says
        except Exception as error:
            return f"{name} cannot be read ({error})"
        if value.shape != tuple(shapes[name]) or value.dtype != np.float32:
            return f"{name} is {value.dtype} {value.shape}, not float32 {tuple(shapes[name])}"
        if not np.isfinite(value).all():
            return f"{name} is not finite"
    return None


def check_report(reply: Message) -> str | None:
    """Why the numbers in a reply cannot be used, or None: exactly REPORT, in range, a whole number of examples."""
    reports = list(reply.content.metric_records.values())
    if len(reports) != 1 or set(reports[0]) != REPORT:
        return f"does not report exactly {', '.join(sorted(REPORT))}"
    for name, value in metrics_of(reply).items():
        is_usable = isinstance(value, int | float) and 0 <= value <= MOST  # nor NaN
        if not is_usable or (name == "num-examples" and (value < 1 or value % 1)):
            return f"{name}={value} is no usable number"
    worker = reply.content.config_records.get("worker")
    if worker is None or not isinstance(worker.get("process"), str):
        return "does not say which process answered"
    return None


def check_scores(reply: Message, least: float = 0, most: float = MOST) -> str | None:
    """Why scores cannot be used, or None: plausible sums by category, of `least` to `most` tokens together."""
    if reply.has_error():
        return str(reply.error.reason)
    scores = reply.content.metric_records.get("scores")
    if scores is None or len(scores) > MOST_CATEGORIES:
        return f"does not report scores of up to {MOST_CATEGORIES} categories"
    for name, sums in scores.items():
        if len(name) > LONGEST_NAME or not isinstance(sums, list) or len(sums) != len(FIELDS):
            return f"category {name[:LONGEST_NAME]} does not report exactly {', '.join(FIELDS)}"
        loss, right, tokens, exact, rouge, answers = sums
        if not (0 <= loss <= MOST and 0 <= right <= tokens and 1 <= tokens <= MOST and tokens == int(tokens)):
            return f"category {name}: loss={loss}, right={right}, tokens={tokens} are no usable numbers"
        if not (0 <= exact <= answers and 0 <= rouge <= answers and answers <= MOST and answers == int(answers)):
            return f"category {name}: exact={exact}, rouge_l={rouge}, answers={answers} are no usable numbers"
    tokens = tokens_of(reply)
    return None if least <= tokens <= most else f"its scores are of {tokens:g} tokens, which cannot be"


def tokens_of(reply: Message) -> float:
    """Tokens that scores are of."""
    return float(sum(row[FIELDS.index("tokens")] for row in scores_of([reply]).values()))


def scores_of(replies: Sequence[Message]) -> Scores:
    """The sum of checked scores."""
    total: Scores = {}
    for reply in replies:
        for name, sums in reply.content.metric_records["scores"].items():
            name = printable(name)
            total[name] = total.get(name, 0.0) + np.array(sums, float)
    return total


def update_norm(reply: Message, sent: Adapter) -> float:
    """Euclidean norm of what a checked reply changes in the adapter that its client was sent."""
    arrays = next(iter(reply.content.array_records.values()))
    squares = [np.square(array.numpy() - sent[name], dtype=np.float64).sum() for name, array in arrays.items()]
    return float(np.sqrt(np.sum(squares)))


def outliers(norms: Mapping[int, float], earlier: Sequence[float], most: float | None) -> dict[int, str]:
    """Why the updates of some clients are too large: their norm is above `most` times the median.

    Those of good updates of `earlier` rounds count for it too, so that a few clients cannot decide what is ordinary. Of
    an even number of updates the lower middle one is the median; updates of nothing do not count.
    """
    known = [norm for norm in (*norms.values(), *earlier) if norm]
    if most is None or not known:
        return {}
    median = statistics.median_low(known)
    limit = f"above strategy.max_norm_ratio={most:g} times the median of {median:.3g}"
    large = {partition: norm for partition, norm in norms.items() if norm > most * median}
    return {partition: f"its update has a norm of {norm:.3g}, {limit}" for partition, norm in large.items()}


def metrics_of(reply: Message) -> Mapping[str, Any]:
    return cast(MetricRecord, next(iter(reply.content.metric_records.values())))


def process_of(reply: Message) -> str:
    worker: Any = reply.content["worker"]
    return str(worker["process"])
