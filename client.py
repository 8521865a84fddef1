"""One client's round: adapter in, local fine-tuning, adapter out.

The handlers translate Flower messages; the work sits in plain functions that never see Flower. A
process that serves many rounds keeps one `Worker`: base model, tokenizer, trainer and tokenized rows
are made once, and between rounds only the adapter, the optimizer and the randomness are new.
"""

import dataclasses
import functools
import gc
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import dataset
import model as adapters
from dataset import NO_ANSWER, Partition, Rows, fresh_rows
from exchange import kinds, transfer
from exchange.faults import WORKER_DIED, failure_of
from exchange.scores import Scores, figures
from exchange.transfer import to_record
from hub import models as hub
from learning.evaluation import HeldOut, held_out, score
from learning.memory import advice, peak, settled, start_peak
from learning.training import Task, by_length, make_trainer, padded_tokens, train_on
from machine.faults import is_out_of_memory, is_unusable
from model import Adapter, first_sentence
from settings.schema import RunConfig, SettingsError, WorkerError, public
from utils import log_to_file, seed_of

log = logging.getLogger(__name__)

FETCHED_S = 2.0  # how long a client's introduction waits for the base model to be on its machine
GLOBAL_SET = -1  # in place of a partition id: the rows of dataset.eval_name
_resident: dict[str, "Worker"] = {}  # by settings, at most one: what outlives a message in this process

# --- the work, without Flower ---------------------------------------------------------------------


class Worker:
    """What stays in a process between rounds."""

    def __init__(self, config: RunConfig, cache_folder: Path | None = None, own_rows: bool = False) -> None:
        self.config, self.cache_folder, self.own_rows = config, cache_folder, own_rows
        self.partitions: dict[int, Partition] = {}
        self.splits: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.held: dict[int, HeldOut] = {}
        self.counts = {"model_loads": 0, "tokenizations": 0}  # since they were last reported
        self.broken: SettingsError | None = None  # why the base model does not load: it is tried once
        self.final: Adapter | None = None  # what the run ended with
        torch.set_num_threads(min(config.client_resources.num_cpus, os.cpu_count() or 1))

    @functools.cached_property
    def tokenizer(self) -> Any:
        return adapters.read_tokenizer(self.config.model)

    @functools.cached_property
    def template(self) -> str:
        return dataset.read_template(self.config.dataset, self.tokenizer)

    @functools.cached_property
    def rows(self) -> Rows:
        return dataset.load_rows(self.config.dataset)

    @functools.cached_property
    def eval_rows(self) -> Rows:
        return dataset.load_eval_rows(self.config.dataset)

    @functools.cached_property
    def partitioner(self) -> Any:
        config = self.config
        return dataset.partition_rows(self.rows, config.dataset, config.num_clients, config.seed)

    @functools.cached_property
    def fetching(self) -> Future[None]:
        """Done when all that the Hub has for this client is on its machine."""
        return ThreadPoolExecutor(1).submit(self.fetch)

    def fetch(self) -> None:
        adapters.base_folder(self.config.model, weights=True)
        self.rows  # noqa: B018
        if self.config.dataset.eval_name:
            self.eval_rows  # noqa: B018

    def raw_rows(self, partition_id: int) -> Rows:
        """A client's rows before tokenization: its partition, or all there are if they are its own."""
        if partition_id == GLOBAL_SET:
            return self.eval_rows
        return self.rows if self.own_rows else dataset.partition_of(self.rows, self.partitioner, partition_id)

    @functools.cached_property
    def plan(self) -> tuple[adapters.LoraConfig, dict[str, tuple[int, ...]]]:
        """The adapter that these settings make in this base model, known without its weights."""
        return adapters.adapter_plan(self.config.model, adapters.read_config(self.config.model))

    @functools.cached_property
    def trainer(self) -> Any:
        """The one trainer of this process, around the resident base model and its adapter."""
        if self.broken:
            raise self.broken
        config = self.config.model
        gc.unfreeze()
        gc.collect()  # a base model of other settings has to go before this one comes
        try:
            device = adapters.device_of(self.config.client_resources)
            model = adapters.add_adapter(adapters.load_base(config, device), config)
        except SettingsError as error:
            self.broken = error
            raise
        self.counts["model_loads"] += 1
        self.untrained = adapters.get_adapter(model)
        trainer = make_trainer(model, self.tokenizer, settled(self.config))
        gc.freeze()  # the trainer collects garbage in every round, which takes long among all that stays
        return trainer

    @functools.cached_property
    def initial(self) -> Adapter:
        """The adapter before the first round, as the server makes it; DoRA's magnitudes are the base model's."""
        self.trainer  # noqa: B018  sets `untrained`
        shapes = {name: value.shape for name, value in self.untrained.items()}
        lora = self.model.peft_config["default"]
        made = adapters.initial_adapter(shapes, lora, self.config.seed)
        return dict(sorted((self.untrained | made).items()))

    def take_counts(self) -> dict[str, int]:
        """What was done since the last report; it is reported once."""
        taken, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        return taken

    @property
    def model(self) -> Any:
        return self.trainer.model

    def partition(self, partition_id: int) -> Partition:
        """The tokenized rows of a client: from memory, from another worker's file, or made now.

        Raises ValueError if not one token of them could be trained on.
        """
        if partition_id not in self.partitions:
            file = self.cache_folder / f"partition_{partition_id}.safetensors" if self.cache_folder else None
            kept = dataset.load_partition(file) if file else None
            if kept is None:
                rows, limit = self.raw_rows(partition_id), self.config.train.seq_length
                kept = dataset.tokenize_rows(rows, self.tokenizer, self.template, limit, self.config.dataset.train_on)
                self.counts["tokenizations"] += partition_id != GLOBAL_SET
                if file:
                    dataset.save_partition(kept, file)
            self.partitions[partition_id] = kept
        if not len(self.partitions[partition_id]):
            whose = "dataset.eval_name" if partition_id == GLOBAL_SET else f"client {partition_id}"
            raise nothing_to_train(whose, self.partitions[partition_id])
        return self.partitions[partition_id]

    def split(self, partition_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of a client's rows for training, and of those for evaluation."""
        if partition_id not in self.splits:
            share, seed = self.config.dataset.holdout, self.config.seed
            self.splits[partition_id] = dataset.split_holdout(self.partition(partition_id), share, seed, partition_id)
        return self.splits[partition_id]

    def held_out(self, partition_id: int) -> HeldOut:
        """What a client, or GLOBAL_SET, has to evaluate on."""
        if partition_id not in self.held:
            partition, raw = self.partition(partition_id), self.raw_rows(partition_id)
            chosen = np.arange(len(partition)) if partition_id == GLOBAL_SET else self.split(partition_id)[1]
            self.held[partition_id] = held_out(partition, chosen, raw, self.config.dataset.category_column)
        return self.held[partition_id]


def nothing_to_train(whose: str, partition: Partition) -> Exception:
    """What to say where not one token of all rows could be trained on; the reasons stay where the rows are."""
    counts, do = partition.counts, "look at the data, or at dataset.partitioner"
    what = f"{whose}: none of its {counts['rows']} rows has a response that can be trained"
    left_out = f"{counts['without_response']} {NO_ANSWER}; {counts.get('refused', 0)} refused by the template"
    error = ValueError(f"{what} ({'; '.join(partition.reasons)}); {do}")
    return cast(Exception, public(error, f"{what} ({left_out}); {do}"))


def fine_tune(worker: Worker, adapter: Adapter, partition_id: int, task: Task) -> tuple[Adapter, dict[str, Any]]:
    """Train `adapter` for one round on rows that this client has not used yet.

    Returns the new adapter, and a report: mean loss of the steps, rows, tokens, seconds by part.
    """
    seconds = dict.fromkeys(("load_s", "data_s", "train_s"), 0.0)
    with timed(seconds, "load_s"):
        trainer = worker.trainer
        start_peak(worker.model.device)
        adapters.set_adapter(worker.model, adapter)
    with timed(seconds, "data_s"):
        partition, (rows, _) = worker.partition(partition_id), worker.split(partition_id)
        config = worker.config
        wanted = config.batch_size * config.train.training_arguments["max_steps"]
        chosen = fresh_rows(rows, task.first_row, wanted, config.seed, partition_id)
        batches = by_length([partition.row(index) for index in chosen], config.batch_size)
    with timed(seconds, "train_s"):
        loss = train_on(trainer, batches, task, seed_of("dropout", config.seed, task.round_number, partition_id))
    with timed(seconds, "load_s"):
        trained = adapters.get_adapter(worker.model)
    return trained, {
        "train_loss": loss,
        "num-examples": len(rows),
        "rows": len(chosen),
        "tokens": sum(len(row["input_ids"]) for row in batches),
        "padded_tokens": padded_tokens(batches, trainer.args.per_device_train_batch_size),
        **{name: partition.counts.get(name, 0) for name in ("without_response", "refused", "cut")},
        **peak(trainer.model.device),
        **worker.take_counts(),
        **seconds,
    }


def evaluate_adapter(worker: Worker, adapter: Adapter, partition_id: int) -> Scores:
    """Scores of `adapter` on the rows that the client holds out, or on GLOBAL_SET; none if there are none."""
    adapters.set_adapter(worker.model, adapter)
    asked, most = worker.config.evaluate, worker.config.train.tokens_at_once
    data = worker.held_out(partition_id)
    return score(worker.model, worker.tokenizer, data, most, asked.answers, asked.max_new_tokens)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the seconds that this takes to a part of a client's round."""
    start = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - start


# --- Flower ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """What the handlers of one run know besides the message."""

    config: RunConfig
    own_rows: bool = False
    """All rows of `dataset.name` are this client's; otherwise it has its partition of them."""
    cache_folder: Path | None = None
    """Where the workers of one machine share tokenized partitions."""
    log_file: Path | None = None
    is_resident: bool = False
    """The process is a node's resident worker, and outlives its messages."""


def client_app(site: Site) -> ClientApp:
    """A ClientApp for `site`. Its handlers are importable functions, so that a Ray worker's caches hold."""
    return kinds.client_app(lambda name: functools.partial(answer, name, site))


def answer(name: str, site: Site, message: Message, context: Context) -> Message:
    """Reply with what the handler returns, or with what it raises: a line, or a traceback."""
    try:
        content = handle(name, site, message.content, int(context.node_config["partition-id"]))
        return Message(content, reply_to=message)
    except Exception as error:  # whatever it is, the server must learn of it
        code, _, whole = failure_of(error)
        log.error("%s", whole, exc_info=code == WORKER_DIED)
        return Message(Error(code, whole), reply_to=message)


def handle(name: str, site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    """Answer one message's content, in this process's worker."""
    start = time.perf_counter()
    if site.log_file:
        log_to_file(site.log_file)
    try:
        reply = HANDLERS[name](site, content, partition_id)
    except RuntimeError as error:
        if is_unusable():
            failed = f"its GPU failed ({first_sentence(error)}), and its worker process was replaced"
            raise WorkerError(failed) from error
        if not is_out_of_memory(error):
            raise
        with suppress(RuntimeError):  # the card may be too full for a context
            torch.cuda.empty_cache()
        reason = f"out of GPU memory ({first_sentence(error)}); it helps: {advice(site.config)}"
        raise public(RuntimeError(reason)) from None
    if "metrics" in reply.metric_records:
        reply.metric_records["metrics"]["total_s"] = time.perf_counter() - start
    return reply


def describe(site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    """Who this client is: its partition, its number of rows, its device; and what it is still waiting for."""
    worker = resident_worker(site)
    on_gpu = adapters.device_of(site.config.client_resources) == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}"
    facts = ConfigRecord({"partition-id": partition_id, "device": device, "own-data": site.own_rows})
    try:
        worker.fetching.result(FETCHED_S if site.is_resident else None)  # else the download would end with the process
        facts["num-rows"] = len(worker.raw_rows(partition_id))
    except TimeoutError:
        facts["num-rows"], facts["loading"] = 0, site.config.model.name
    except Exception:
        _resident.clear()  # the next run tries again, from the start
        raise
    return RecordDict({"client": facts})


def initial(site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    """The adapter as PEFT initialises it inside the base model, for tensors that depend on the base weights."""
    return RecordDict({"arrays": to_record(resident_worker(site).initial)})


def train(site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    config: Any = content["config"]
    number, rate, first = int(config["server-round"]), float(config["learning-rate"]), int(config["first-row"])
    task = Task(number, rate, first, float(config.get("proximal-mu", 0.0)))
    worker = resident_worker(site)
    received = received_adapter(worker, content)
    adapter, report = fine_tune(worker, received, partition_id, task)
    arrays = to_record(transfer.encode(adapter, received, site.config.transfer))
    process = ConfigRecord({"process": f"{platform.node()}:{os.getpid()}"})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(report), "worker": process})


def evaluate(site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    """How good the received adapter is on rows that nobody trains on: this client's, or everybody's."""
    worker, config = resident_worker(site), cast(Any, content["config"])
    rows_of = GLOBAL_SET if config["rows"] == "global" else partition_id
    scores = evaluate_adapter(worker, received_adapter(worker, content), rows_of)
    sums = MetricRecord({name: row.tolist() for name, row in scores.items()})
    told = {"eval_loss": figures(scores)["loss"]} if scores else {}  # for this client's own terminal
    return RecordDict({"scores": sums, "metrics": MetricRecord(told)})


HANDLERS = {handler.__name__: handler for handler in (describe, initial, train, evaluate)}


def resident_worker(site: Site) -> Worker:
    """This process's worker, made at the first call with these settings and kept."""
    key = json.dumps([dataclasses.asdict(site.config), site.own_rows], sort_keys=True)
    if key not in _resident:
        _resident.clear()
        hub.forget()
        _resident[key] = Worker(site.config, site.cache_folder, site.own_rows)
    return _resident[key]


def received_adapter(worker: Worker, content: RecordDict) -> Adapter:
    arrays, form = transfer.arrays_of(content.array_records["arrays"]), worker.config.transfer
    if form == "fp32":
        return arrays
    if content.config_records["config"]["initial-sha256"] != transfer.digest(worker.initial):
        why = "(another version of peft or numpy, or another base model?); use transfer=fp32"
        raise public(ValueError(f"transfer={form}: this client makes another initial adapter than the server {why}"))
    return transfer.decode(arrays, worker.initial, form)
