"""Local fine-tuning: a few optimizer steps of an adapter inside a resident base model. Knows neither Flower nor data.

A row is `{"input_ids": [...], "labels": [...]}`; labels of IGNORED carry no loss.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

import model as adapters
from dataset import IGNORED
from learning.head import labelled, labelled_positions
from settings.schema import RunConfig, check_keywords

DECIDED = {  # what decides fields of `trl.SFTConfig` that cannot be set
    "set train.learning_rate_max and train.learning_rate_min": "learning_rate",
    "set train.training_arguments.max_steps and num_rounds": "num_train_epochs",
    "set train.seq_length": "max_length",
    "set seed": "seed data_seed",
    "set hydra.run.dir": "output_dir",
    "set strategy.fraction_evaluate": "eval_strategy",
    "set train.save_every_round": "save_strategy",
    "set dataset.template": "chat_template_path",
    "set model.*": "model_init_kwargs",
    "metrics are in metrics.jsonl": "report_to",
    "rows are sorted by length instead": "packing padding_free",
    "rows come tokenized": "remove_unused_columns dataset_kwargs",
    "every round sees fresh rows": "train_sampling_strategy",
    "runs are not resumed by the trainer": "resume_from_checkpoint",
    "a worker trains on one device": "deepspeed fsdp fsdp_config accelerator_config",
    "upload a checkpoint yourself: hf upload": "push_to_hub hub_model_id hub_token",
    "the base model's own is used: see its dtype": "bf16 fp16 bf16_full_eval fp16_full_eval",
    "the loss is cross-entropy": "loss_type label_smoothing_factor",
}
MANAGED_ARGUMENTS = {name: reason for reason, names in DECIDED.items() for name in names.split()}


@dataclass(frozen=True)
class Task:
    """What the server asks of a client for one round."""

    round_number: int
    learning_rate: float
    first_row: int = 0  # rows that this client has trained on before: it continues after them
    proximal_mu: float = 0.0  # FedProx: strength of the pull towards the received adapter


def train_on(trainer: SFTTrainer, rows: list[dict[str, list[int]]], task: Task, seed: int) -> float:
    """Take the trainer's `max_steps` steps over `rows` in their order; returns the mean loss of the steps.

    Optimizer, schedule and randomness start afresh, so that nothing leaks from one client to the next.
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

    def pull(weight: torch.Tensor, start: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return grad + mu * (weight.detach() - start)

    with ExitStack() as hooks:
        for weight in model.parameters() if mu else ():
            if weight.requires_grad:
                hooks.enter_context(weight.register_hook(partial(pull, weight, weight.detach().clone())))
        yield


def by_length(rows: list[dict[str, list[int]]], batch_size: int) -> list[dict[str, list[int]]]:
    """`rows` with each batch of `batch_size` sorted longest first, so that micro-batches need little padding."""
    batches = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    return [row for batch in batches for row in sorted(batch, key=lambda row: -len(row["input_ids"]))]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of T_i tokens as (rows, max T) tensors, padded on the right, where a causal model never looks.

    There is no attention mask: it would change nothing but the speed. Padding carries no loss; `positions` are those
    that do.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

    return {
        "input_ids": padded("input_ids", 0),
        "labels": (labels := padded("labels", IGNORED)),
        "positions": labelled_positions(labels),  # found here, because on a GPU it would have to be waited for
    }


def padded_tokens(rows: list[dict[str, list[int]]], micro_batch_size: int) -> int:
    """Tokens that are computed when `rows` are collated in passes of `micro_batch_size`, padding included."""
    lengths = [len(row["input_ids"]) for row in rows]
    passes = [lengths[start : start + micro_batch_size] for start in range(0, len(lengths), micro_batch_size)]
    return sum(max(each) * len(each) for each in passes)


class LabelledTrainer(SFTTrainer):
    """trl's trainer with the head where a label is, in this suite's arithmetic, and without figures nobody reads."""

    loss_is_scaled_for_ga = True  # by the number of labels in all passes of a step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with adapters.arithmetic(model):
            found = labelled(model, inputs, **options)
            loss = found.loss() / num_items_in_batch.clamp(min=1)
            if self.aux_loss_enabled:  # of a mixture of experts, by the model's own code
                loss = loss + self.router_aux_loss_coef * found.auxiliary() / self.current_gradient_accumulation_steps
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # counting them goes through all parameters, for every pass


def make_trainer(model: Any, tokenizer: Any, config: RunConfig) -> SFTTrainer:
    """An SFTTrainer whose optimizer step is `batch_size` rows, tokenized and ordered, in passes of `micro_batch_size`.

    The loss of a step is normalised by all its response tokens, so the passes add up to the gradient of the whole.
    """
    with (
        tempfile.TemporaryDirectory() as unused,
        patch.object(sft_trainer, "add_fused_lm_head"),  # `LabelledTrainer.compute_loss` is in its place, and so
        patch.object(model, "get_output_embeddings", lambda: None),  # LoRA in the head, which trl refuses, is trained
    ):
        trainer = LabelledTrainer(
            model=model,
            args=training_arguments(config, str(unused)),
            data_collator=collate,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
        )
    for weight in model.parameters():
        if weight.requires_grad:  # trl makes a quantized model's adapter bfloat16, where small steps are lost
            weight.data = weight.data.float()
    trainer.model_accepts_loss_kwargs = True  # else it does not count those labels
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(config: RunConfig, output_folder: str) -> SFTConfig:
    """`train.training_arguments` with what this suite decides. Raises SettingsError for fields that do not exist."""
    given = dict(config.train.training_arguments)
    check_keywords("train.training_arguments", given, SFTConfig, MANAGED_ARGUMENTS)
    cuda = adapters.device_of(config.client_resources) == "cuda"
    given["gradient_checkpointing"] = bool(given.get("gradient_checkpointing"))  # `auto` is settled before
    micro = min(config.train.micro_batch_size, config.batch_size)
    if config.client_resources.num_gpus and not cuda:
        given.pop("tf32", None)  # a driver sees no GPU: its workers check it
    if given["gradient_checkpointing"] and config.model.quantization == "8":
        given.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": True})
    given |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": config.batch_size // micro}
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": cuda,
        "accelerator_config": {"non_blocking": cuda},
        "disable_tqdm": True,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # else each pass waits for the GPU, and a loss of NaN is replaced
    }
    arguments = SFTConfig(
        **(defaults | given),
        output_dir=output_folder,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        bf16=False,  # `model.arithmetic` says it
        use_cpu=not cuda,
        seed=config.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # however many this process sees: the model is on one
    return arguments
