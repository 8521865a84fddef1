"""The part of a node's policy that needs its rows or its model, and what a node says of itself."""

import dataclasses
import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from flwr.app import MetricRecord, RecordDict

from client import GLOBAL_SET, Worker
from dataset import Partition, Rows
from exchange.scores import FIELDS
from learning.evaluation import HeldOut
from settings.policy import Policy, check_adapter, refusal

FIRST_ANSWER_FIELD = FIELDS.index("exact")  # it and those behind it are of answered rows


def check_adapter_of(worker: Worker, policy: Policy) -> None:
    """Raise SettingsError if a run trains what `policy` does not allow, looked up in the model itself."""
    check_adapter(policy, worker.plan[1])


def check_arrays(worker: Worker, content: Any) -> None:
    """Raise SettingsError if what is sent whole is no adapter of this run: PEFT would load base weights as well."""
    if worker.config.transfer != "fp32":
        return  # what travels otherwise is decoded against the adapter that this node makes
    found = {name: tuple(array.shape) for name, array in content["arrays"].items()}
    for name in sorted(found.keys() ^ worker.plan[1].keys()):
        raise refusal("arrays", name[:100], "the tensors of the run's adapter to be sent, all of them and no other")
    for name, shape in worker.plan[1].items():
        if found[name] != tuple(shape):
            raise refusal("arrays", f"{name[:100]} {found[name]}", f"{tuple(shape)}")


def check_count(rows: int, policy: Policy) -> None:
    if rows < policy.min_step_rows:
        raise refusal("rows of this node", rows, f"at least {policy.min_step_rows} to train on (min_step_rows)")


def check_training(worker: Worker, policy: Policy, content: Any, partition_id: int) -> None:
    """Raise SettingsError if a training message asks for more than `policy` allows.

    As many different rows as a step needs are enough: a step that runs over the end of a pass still has half of them.
    """
    config = content["config"]
    for key, most in (("learning-rate", policy.max_learning_rate), ("first-row", 1e15), ("proximal-mu", 1e6)):
        value = config.get(key, 0.0)
        if not isinstance(value, int | float) or not 0 <= value <= most:  # nor NaN
            raise refusal(key, value, f"0 to {most:g}")
    check_count(different(worker.partition(partition_id), worker.split(partition_id)[0]), policy)


def different(partition: Partition, chosen: Any) -> int:
    """How many of the `chosen` rows have other tokens than each other."""
    keys = partition.keys()
    return len({keys[index] for index in chosen})


def check_evaluation(worker: Worker, policy: Policy, content: Any, partition_id: int) -> None:
    """Raise SettingsError if too few rows stand behind a score; categories with too few rows lose their names."""
    rows_of = GLOBAL_SET if content["config"]["rows"] == "global" else partition_id
    data = worker.held_out(rows_of)
    if 0 < len(data.rows) < policy.min_held_out_rows:
        key, value = "dataset.holdout", worker.config.dataset.holdout
        raise refusal(key, value, f"no score of fewer than {policy.min_held_out_rows} rows (min_held_out_rows)")
    worker.held[rows_of] = with_large_categories(data, policy.min_held_out_rows)


def with_large_categories(data: HeldOut, least: int) -> HeldOut:
    """`data` with categories of fewer than `least` rows merged; if what is left over is as small, none is named."""
    counts = Counter(data.categories)
    names = [name if counts[name] >= least else "" for name in data.categories]
    if 0 < names.count("") < least:
        names = [""] * len(names)
    return dataclasses.replace(data, categories=names)


def without_few_answers(reply: RecordDict, policy: Policy) -> RecordDict:
    """`reply`, without what it says of answers of a category if it has fewer than `min_held_out_rows` of them."""
    scores: Any = reply["scores"]
    for name, sums in scores.items():
        if 0 < sums[-1] < policy.min_held_out_rows:
            scores[name] = [*sums[:FIRST_ANSWER_FIELD], *[0.0] * (len(FIELDS) - FIRST_ANSWER_FIELD)]
    reply["scores"] = MetricRecord(dict(scores))
    return reply


def introduction(worker: Worker, node: Mapping[str, Any], partition_id: int) -> dict[str, Any]:
    """What a site says of itself besides the client's own facts; no row can be compared with any of it."""
    config, key = worker.config.dataset, bytes.fromhex(str(node.get("rows-key", "")))
    keeps = "keep" in node
    told = {
        "name": str(node.get("name", "")),
        "lasting": bool(key),
        "own-eval": "eval" in node,
        "wants-adapter": keeps or bool(config.holdout) or "eval" in node,
    }
    if key and "dataset" in node:
        told["rows-fingerprint"] = fingerprint(worker.raw_rows(partition_id), key)
    if key and "eval" in node:
        told["eval-fingerprint"] = fingerprint(worker.eval_rows, key)
    return told


def fingerprint(rows: Rows, key: bytes) -> str:
    """HMAC-SHA256 of what conversations are made of, of all rows in their order, and of how it is read.

    Nobody without `key` can tell of any row whether it is among them.
    """
    uses, columns = list(rows.form.columns), list(rows.form.columns.values())
    digest = hmac.new(key, json.dumps([rows.form.shape, uses]).encode(), hashlib.sha256)
    for row in rows.table.select_columns([*dict.fromkeys(columns)]):
        digest.update(json.dumps([row[column] for column in columns]).encode())  # JSON says where a cell ends
    return digest.hexdigest()
