"""The end of a run on a node: the adapter that it keeps, and what its owner is told."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

import model as adapters
from client import GLOBAL_SET, Worker, evaluate_adapter
from exchange.scores import figures
from model import ADAPTER_FILE, Adapter
from settings.schema import RunError, public
from utils import CARD_FILE, file_sha256, printable, write_whole

MOST_CARD = 100_000  # characters
KINDS = ("final", "best")


def kept(worker: Worker, node: Mapping[str, Any], content: Any) -> RecordDict:
    """Write what a run ends with into `keep` of the node's config, a folder for each run; say where.

    Raises:
        RunError: if it is not the adapter that the server names by its SHA-256, or cannot be written.
    """
    config, folders = content["config"], []
    for kind in KINDS:
        if kind not in content.array_records:
            continue
        adapter = checked(content[kind], worker.plan[1])
        if kind == "final":
            worker.final = adapter
        if "keep" in node:
            folder = Path(node["keep"]) / f"run_{int(node['run-id'])}" / kind
            write(folder, worker, adapter, str(config.get(f"{kind}-card", "")))
            wanted = str(config[f"{kind}-sha256"])
            if (sha256 := file_sha256(folder / ADAPTER_FILE)) != wanted:
                raise public(RunError(f"the {kind} adapter arrived with SHA-256 {sha256}, the server names {wanted}"))
            folders.append(str(folder))
    return RecordDict({"kept": ConfigRecord({"folders": folders}), "metrics": MetricRecord({})})


def checked(record: ArrayRecord, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """The adapter in `record`: these tensors, finite float32."""
    adapter = {name: array.numpy() for name, array in record.items()}
    fits = {name: value.shape for name, value in adapter.items()} == {n: tuple(shape) for n, shape in shapes.items()}
    if not fits or not all(value.dtype == np.float32 and np.isfinite(value).all() for value in adapter.values()):
        raise public(RunError("what the server calls the run's adapter is none of this run"))
    return adapter


def write(folder: Path, worker: Worker, adapter: Adapter, card: str) -> None:
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


def losses(worker: Worker, partition_id: int) -> RecordDict:
    """The held-out loss of this node's own rows, of the base model and of the run's adapter; nothing without either."""
    final = worker.final
    rows_of = partition_id if worker.config.dataset.holdout else GLOBAL_SET
    if final is None or (rows_of == GLOBAL_SET and not worker.config.dataset.eval_name):
        return RecordDict()
    adapters_by_time = {"before": worker.initial, "after": final}
    found = {when: figures(evaluate_adapter(worker, each, rows_of)) for when, each in adapters_by_time.items()}
    if not all(found.values()):
        return RecordDict()
    count = {"rows": len(worker.held_out(rows_of).rows)}
    return RecordDict({"losses": MetricRecord({when: values["loss"] for when, values in found.items()} | count)})
