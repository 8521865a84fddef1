"""What a node does for each kind of message, within its policy. Imports the model libraries."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

import client
import model as adapters
from client import GLOBAL_SET, Site, Worker
from deployment import limits
from deployment.acceptance import Place
from exchange.scores import figures
from settings.policy import check_adapter
from settings.schema import RunError, public
from utils import CARD_FILE, file_sha256, printable, write_whole

MOST_CARD = 100_000  # characters


def site_of(place: Place) -> Site:
    return Site(place.config, place.own_rows, is_resident="resident" in place.node)


def worker_of(place: Place) -> Worker:
    """This process's worker, if the run trains what the node's policy allows. Raises SettingsError otherwise."""
    worker = client.resident_worker(site_of(place))
    check_adapter(place.policy, worker.plan[1])
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
        facts.update(limits.introduction(worker, place.node, place.partition_id))
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


# --- the end of a run -----------------------------------------------------------------------------


def final(place: Place, content: Any) -> RecordDict:
    """Write what a run ends with into `keep` of the node's config, a folder for each run; say where.

    Raises RunError if it is not the adapter that the server names by its SHA-256, or cannot be written.
    """
    worker, node, config, folders = worker_of(place), place.node, content["config"], []
    for kind in ("final", "best"):
        if kind not in content.array_records:
            continue
        adapter = checked(content[kind], worker.plan[1])
        if kind == "final":
            worker.final = adapter
        if "keep" in node:
            folder = Path(node["keep"]) / f"run_{int(node['run-id'])}" / kind
            write(folder, worker, adapter, str(config.get(f"{kind}-card", "")))
            wanted = str(config[f"{kind}-sha256"])
            if (sha256 := file_sha256(folder / adapters.ADAPTER_FILE)) != wanted:
                raise public(RunError(f"the {kind} adapter arrived with SHA-256 {sha256}, the server names {wanted}"))
            folders.append(str(folder))
    return RecordDict({"kept": ConfigRecord({"folders": folders}), "metrics": MetricRecord({})})


def checked(record: ArrayRecord, shapes: Mapping[str, tuple[int, ...]]) -> adapters.Adapter:
    """The adapter in `record`: these tensors, finite float32."""
    adapter = {name: array.numpy() for name, array in record.items()}
    fits = {name: (value.dtype, value.shape) for name, value in adapter.items()} == {
        name: (np.dtype(np.float32), tuple(shape)) for name, shape in shapes.items()
    }
    if not fits or not all(np.isfinite(value).all() for value in adapter.values()):
        raise public(RunError("what the server calls the run's adapter is none of this run"))
    return adapter


def write(folder: Path, worker: Worker, adapter: adapters.Adapter, card: str) -> None:
    """Write an adapter in PEFT's format; its configuration and template are this node's own, as in training."""
    beside = folder.with_suffix(".new")
    shutil.rmtree(beside, ignore_errors=True)  # of a node that was killed
    try:
        adapters.save_adapter(beside, adapter, worker.plan[0], worker.template)
        write_whole(beside / CARD_FILE, printable(card[:MOST_CARD]))
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except OSError as error:
        raise RunError(f"--keep={folder}: the adapter cannot be written ({error})") from error


def losses(place: Place, content: Any) -> RecordDict:
    """The held-out loss of this node's own rows, of the base model and of the run's adapter; nothing without either.

    It is what this node tells its own owner at the end, and never sent.
    """
    worker = worker_of(place)
    final, data = worker.final, worker.config.dataset
    rows_of = place.partition_id if data.holdout else GLOBAL_SET
    if final is None or not (data.holdout or data.eval_name):
        return RecordDict()
    when = {"before": worker.initial, "after": final}
    found = {name: figures(client.evaluate_adapter(worker, each, rows_of)) for name, each in when.items()}
    if not all(found.values()):
        return RecordDict()
    count = {"rows": len(worker.held_out(rows_of).rows)}
    return RecordDict({"losses": MetricRecord({name: values["loss"] for name, values in found.items()} | count)})


HANDLERS: dict[str, Callable[[Place, Any], RecordDict]] = {
    each.__name__: each for each in (describe, initial, train, evaluate, final, losses)
}
