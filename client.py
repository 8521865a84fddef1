"""One client's round: adapter in, local fine-tuning, adapter out.

The handlers translate Flower messages; the work sits in plain functions that never see Flower. A
process that serves many rounds keeps one `Worker`: base model, tokenizer, trainer and tokenized rows
are made once, and between rounds only the adapter, the optimizer and the randomness are new.
"""

import dataclasses
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

import model as adapters
from config import RunConfig, check_keywords
from dataset import (
    IGNORED,
    Partition,
    fresh_rows,
    load_partition,
    load_rows,
    partition_rows,
    read_template,
    save_partition,
    split_holdout,
    tokenize_rows,
)
from model import Adapter
from resident import replied
from utils import log_to_file, peak_resident_bytes, seed_of

_resident: dict[str, "Worker"] = {}  # by settings, at most one: what outlives a message in this process

MANAGED_ARGUMENTS = {
    "learning_rate": "set train.learning_rate_max and train.learning_rate_min",
    "max_length": "set train.seq_length",
    "seed": "set seed",
    "data_seed": "set seed",
    "output_dir": "set hydra.run.dir",
    "report_to": "metrics are in metrics.jsonl",
    "packing": "rows are sorted by length instead",
    "padding_free": "rows are sorted by length instead",
    "eval_strategy": "set strategy.fraction_evaluate",
    "save_strategy": "set train.save_every_round",
    "train_sampling_strategy": "every round sees fresh rows",
    "remove_unused_columns": "rows come tokenized",
    "chat_template_path": "set dataset.template",
    "resume_from_checkpoint": "runs are not resumed by the trainer",
    "deepspeed": "a worker trains on one device",
    "fsdp": "a worker trains on one device",
    "fsdp_config": "a worker trains on one device",
    "accelerator_config": "a worker trains on one device",
    "model_init_kwargs": "set model.*",
    "dataset_kwargs": "rows come tokenized",
    "push_to_hub": "upload a checkpoint yourself: hf upload",
    "hub_model_id": "upload a checkpoint yourself: hf upload",
    "hub_token": "upload a checkpoint yourself: hf upload",
    "num_train_epochs": "set train.training_arguments.max_steps and num_rounds",
}


@dataclass(frozen=True)
class Task:
    """What the server asks of a client for one round."""

    round_number: int
    learning_rate: float
    first_row: int = 0
    """Rows that this client has trained on before: it goes on behind them."""
    proximal_mu: float = 0.0
    """FedProx: strength of the pull towards the received adapter."""


# --- the work, without Flower ---------------------------------------------------------------------


class Worker:
    """What stays in a process between rounds."""

    def __init__(self, config: RunConfig, cache_folder: Path | None = None, own_rows: bool = False) -> None:
        self.config, self.cache_folder, self.own_rows = config, cache_folder, own_rows
        self.partitions: dict[int, Partition] = {}
        self.counts = {"model_loads": 0, "tokenizations": 0}  # since they were last reported
        torch.set_num_threads(min(config.client_resources.num_cpus, os.cpu_count() or 1))

    @functools.cached_property
    def tokenizer(self) -> Any:
        return adapters.read_tokenizer(self.config.model)

    @functools.cached_property
    def template(self) -> str:
        return read_template(self.config.dataset, self.tokenizer)

    @functools.cached_property
    def partitioner(self) -> Any:
        config = self.config
        return partition_rows(load_rows(config.dataset), config.dataset, config.num_clients, config.seed)

    def raw_rows(self, partition_id: int) -> Dataset:
        """A client's rows before tokenization: its partition, or all there are if they are its own."""
        return load_rows(self.config.dataset) if self.own_rows else self.partitioner.load_partition(partition_id)

    @functools.cached_property
    def trainer(self) -> SFTTrainer:
        """The one trainer of this process, around the resident base model and its adapter."""
        self.counts["model_loads"] += 1
        base = adapters.load_base(self.config.model)
        return make_trainer(adapters.add_adapter(base, self.config.model), self.tokenizer, self.config)

    def take_counts(self) -> dict[str, int]:
        """What was done since the last report; it is reported once."""
        taken, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        return taken

    @property
    def model(self) -> Any:
        return self.trainer.model

    def partition(self, partition_id: int) -> Partition:
        """The tokenized rows of a client: from memory, from another worker's file, or made now.

        Raises:
            ValueError: if not one token of the client's rows could be trained on.
        """
        if partition_id not in self.partitions:
            file = self.cache_folder / f"partition_{partition_id}.safetensors" if self.cache_folder else None
            if file and file.exists():
                self.partitions[partition_id] = load_partition(file)
            else:
                rows = self.raw_rows(partition_id)
                made = tokenize_rows(rows, self.tokenizer, self.template, self.config.train.seq_length)
                self.counts["tokenizations"] += 1
                self.partitions[partition_id] = made
                if file:
                    save_partition(made, file)
        partition = self.partitions[partition_id]
        if not len(partition):
            raise ValueError(
                f"client {partition_id}: none of its {partition.counts['rows']} rows has a response to train on "
                "(column output); look at the data, or at dataset.partitioner"
            )
        return partition

    def training_rows(self, partition_id: int) -> np.ndarray:
        return self._split(partition_id)[0]

    def holdout_rows(self, partition_id: int) -> np.ndarray:
        return self._split(partition_id)[1]

    def _split(self, partition_id: int) -> tuple[np.ndarray, np.ndarray]:
        share = self.config.dataset.holdout
        return split_holdout(len(self.partition(partition_id)), share, self.config.seed, partition_id)


def fine_tune(worker: Worker, adapter: Adapter, partition_id: int, task: Task) -> tuple[Adapter, dict[str, Any]]:
    """Train `adapter` for one round on rows that this client has not used yet.

    Returns:
        The new adapter, and a report: mean loss of the steps, rows, tokens, seconds by part.
    """
    clock = Clock()
    with clock.part("load_s"):
        trainer = worker.trainer
        adapters.set_adapter(worker.model, adapter)
    with clock.part("data_s"):
        partition, rows = worker.partition(partition_id), worker.training_rows(partition_id)
        arguments = worker.config.train.training_arguments
        wanted = worker.config.batch_size * arguments["max_steps"]
        chosen = fresh_rows(rows, task.first_row, wanted, worker.config.seed, partition_id)
        batches = by_length([partition.row(index) for index in chosen], worker.config.batch_size)
    with clock.part("train_s"):
        seed = seed_of("dropout", worker.config.seed, task.round_number, partition_id)
        loss = train_on(trainer, batches, task, seed)
    with clock.part("load_s"):
        trained = adapters.get_adapter(worker.model)
    return trained, {
        "train_loss": loss,
        "num-examples": len(rows),
        "rows": len(chosen),
        "tokens": sum(len(row["input_ids"]) for row in batches),
        "without_response": partition.counts["without_response"],
        "cut": partition.counts["cut"],
        "peak_memory_bytes": peak_memory_bytes(),
        **worker.take_counts(),
        **clock.seconds,
    }


def train_on(trainer: SFTTrainer, rows: list[dict[str, list[int]]], task: Task, seed: int) -> float:
    """Take the trainer's `max_steps` steps over `rows` in their order; returns the mean loss of the steps.

    Optimizer, schedule and randomness start anew, so that nothing leaks from one client to the next.
    """
    model: Any = trainer.model
    trainer.train_dataset = rows
    trainer.args.learning_rate = task.learning_rate
    trainer.optimizer = trainer.lr_scheduler = None
    pull = task.proximal_mu / trainer.args.gradient_accumulation_steps
    with torch.random.fork_rng(), proximal_pull(model, pull):
        torch.manual_seed(seed)
        model.train()
        loss = float(trainer.train().training_loss)
    trainer.optimizer = trainer.lr_scheduler = None
    return loss


@contextmanager
def proximal_pull(model: Any, mu: float) -> Iterator[None]:
    """FedProx (arXiv:1812.06127, equation 2): every backward pass adds the gradient of mu/2 * ||w - w_round||^2."""
    hooks = []
    for weight in model.parameters() if mu else ():
        if weight.requires_grad:
            pull = functools.partial(pulled, weight=weight, start=weight.detach().clone(), strength=mu)
            hooks.append(weight.register_hook(pull))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def pulled(grad: torch.Tensor, *, weight: torch.Tensor, start: torch.Tensor, strength: float) -> torch.Tensor:
    return grad + strength * (weight.detach() - start)


def by_length(rows: list[dict[str, list[int]]], batch_size: int) -> list[dict[str, list[int]]]:
    """`rows` with each batch of `batch_size` sorted longest first, so that micro-batches need little padding."""
    ordered = []
    for start in range(0, len(rows), batch_size):
        ordered += sorted(rows[start : start + batch_size], key=lambda row: -len(row["input_ids"]))
    return ordered


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of T_i tokens as (rows, max T) tensors, padded on the right, where a causal model never looks.

    There is no attention mask: it would change nothing but the speed. Padding carries no loss.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORED),
        "position_ids": torch.arange(longest)[None],
    }


def make_trainer(model: Any, tokenizer: Any, config: RunConfig) -> SFTTrainer:
    """An SFTTrainer whose optimizer step is `batch_size` rows in passes of `micro_batch_size`.

    The loss of a step is normalised by all its response tokens, so the passes add up to the gradient of
    the whole batch. Rows come tokenized and ordered.
    """
    with tempfile.TemporaryDirectory() as unused:
        trainer = SFTTrainer(
            model=model,
            args=training_arguments(config, str(unused)),
            data_collator=collate,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
        )
    for weight in model.parameters():
        if weight.requires_grad:  # trl makes a quantized model's adapter bfloat16, where small steps are lost
            weight.data = weight.data.float()
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(config: RunConfig, output_folder: str) -> SFTConfig:
    """`train.training_arguments` with what this suite decides. Raises SettingsError for fields that do not exist."""
    given = dict(config.train.training_arguments)
    check_keywords("train.training_arguments", given, SFTConfig, MANAGED_ARGUMENTS)
    cuda = adapters.default_device() == "cuda"
    micro = min(config.train.micro_batch_size, config.batch_size)
    if given.get("gradient_checkpointing") and config.model.quantization == "8":
        given.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": True})
    given |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": config.batch_size // micro}
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "bf16": cuda,
        "dataloader_pin_memory": cuda,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return SFTConfig(
        **(defaults | given),
        output_dir=output_folder,
        learning_rate=config.train.learning_rate_max,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        use_cpu=not cuda,
        seed=config.seed,
    )


def evaluate_adapter(worker: Worker, adapter: Adapter, partition_id: int) -> dict[str, Any]:
    """Loss and token accuracy of `adapter` on the client's held-out rows, over response and EOS tokens."""
    worker.trainer  # noqa: B018  the model is resident from here on
    adapters.set_adapter(worker.model, adapter)
    rows = [worker.partition(partition_id).row(index) for index in worker.holdout_rows(partition_id)]
    if not rows:
        raise ValueError(
            f"client {partition_id}: dataset.holdout={worker.config.dataset.holdout} leaves it no row to evaluate on"
        )
    loss, accuracy, tokens = loss_on(worker.model, rows, worker.config.train.micro_batch_size)
    return {"eval_loss": loss, "eval_token_accuracy": accuracy, "num-examples": tokens}


@torch.no_grad()
def loss_on(model: Any, rows: list[dict[str, list[int]]], micro_batch_size: int) -> tuple[float, float, int]:
    """Mean loss and accuracy over all labelled tokens of `rows`, and their number. Leaves `model` in its mode."""
    training = model.training
    model.eval()
    total, right, tokens = 0.0, 0, 0
    ordered = by_length(rows, len(rows))
    for start in range(0, len(ordered), micro_batch_size):
        batch = collate(ordered[start : start + micro_batch_size])
        device = next(model.parameters()).device
        logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits[:, :-1].float()
        labels = batch["labels"][:, 1:].to(device)
        total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        tokens += int((labels != IGNORED).sum())
    model.train(training)
    return total / tokens, right / tokens, tokens


class Clock:
    """Seconds by part of a client's round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"load_s": 0.0, "data_s": 0.0, "train_s": 0.0}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def peak_memory_bytes() -> int:
    """Most memory that this process ever held: on the GPU where there is one, else in main memory."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()


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


def client_app(site: Site) -> ClientApp:
    """A ClientApp for `site`. Its handlers are importable functions, so that a Ray worker's caches hold."""
    app = ClientApp()
    app.query()(functools.partial(answer, "describe", site))
    app.query("initial_adapter")(functools.partial(answer, "initial", site))
    app.train()(functools.partial(answer, "train", site))
    app.evaluate()(functools.partial(answer, "evaluate", site))
    return app


def answer(name: str, site: Site, message: Message, context: Context) -> Message:
    """Reply with what the handler returns, or with the traceback of what it raises."""
    partition_id = int(context.node_config["partition-id"])
    return replied(message, lambda: handle(name, site, message.content, partition_id))


def handle(name: str, site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    """Answer one message's content, in this process's worker."""
    start = time.perf_counter()
    if site.log_file:
        log_to_file(site.log_file)
    reply = HANDLERS[name](site, content, partition_id)
    for record in reply.metric_records.values():
        record["total_s"] = time.perf_counter() - start
    return reply


def describe(site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    """Who this client is: its partition, its number of rows, its device."""
    rows = len(resident_worker(site).raw_rows(partition_id))
    facts = ConfigRecord({"partition-id": partition_id, "num-rows": rows, "device": device_name()})
    return RecordDict({"client": facts})


def initial(site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    """The adapter as PEFT initialises it inside the base model, for tensors that depend on the base weights."""
    return RecordDict({"arrays": to_record(adapters.get_adapter(resident_worker(site).model))})


def train(site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    config: Any = content["config"]
    task = Task(
        round_number=int(config["server-round"]),
        learning_rate=float(config["learning-rate"]),
        first_row=int(config["first-row"]),
        proximal_mu=float(config.get("proximal-mu", 0.0)),
    )
    adapter, report = fine_tune(resident_worker(site), received_adapter(content), partition_id, task)
    return RecordDict({"arrays": to_record(adapter), "metrics": MetricRecord(report), "worker": worker_record()})


def evaluate(site: Site, content: RecordDict, partition_id: int) -> RecordDict:
    report = evaluate_adapter(resident_worker(site), received_adapter(content), partition_id)
    return RecordDict({"metrics": MetricRecord(report), "worker": worker_record()})


HANDLERS: dict[str, Callable[[Site, RecordDict, int], RecordDict]] = {
    "describe": describe,
    "initial": initial,
    "train": train,
    "evaluate": evaluate,
}


def resident_worker(site: Site) -> Worker:
    """This process's worker, made at the first call with these settings and kept."""
    key = json.dumps([dataclasses.asdict(site.config), site.own_rows], sort_keys=True)
    if key not in _resident:
        _resident.clear()
        _resident[key] = Worker(site.config, site.cache_folder, site.own_rows)
    return _resident[key]


def worker_record() -> ConfigRecord:
    return ConfigRecord({"process": f"{platform.node()}:{os.getpid()}"})


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"


def to_record(adapter: Mapping[str, np.ndarray]) -> ArrayRecord:
    """An adapter as a Flower record, sorted by name: some strategies align arrays by position."""
    return ArrayRecord({name: Array(np.ascontiguousarray(adapter[name])) for name in sorted(adapter)})


def received_adapter(content: RecordDict) -> Adapter:
    record: Any = content["arrays"]
    return {name: array.numpy() for name, array in record.items()}
