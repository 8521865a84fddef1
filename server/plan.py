"""Before the start: check that a run can work, and say what it will take. Loads no base model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

import model as adapters
from dataset import (
    COLUMNS,
    find_template,
    load_eval_rows,
    load_rows,
    local_rows,
    partition_rows,
    partitioner_class,
    read_template,
    text_of,
    tokenize_rows,
)
from hub import models as hub
from learning.memory import Sizes, describe_memory, sizes
from learning.training import training_arguments
from server.engine import check_machine, idle_gpus
from server.strategies import make_strategy
from settings.schema import RunConfig, SettingsError, check_budget, share_of
from utils import bytes_text, local_path, shortened

UNKNOWN = "unknown without the network"


def check_names(config: RunConfig) -> None:
    """Raise SettingsError for classes and arguments that do not exist. Reads no data and no network."""
    make_strategy(config)
    partitioner_class(config.dataset)
    lora = adapters.lora_config(config.model)
    if not config.client_resources.num_gpus:
        adapters.check_device(lora.use_dora, config.model.quantization, "cpu")
    if config.dataset.template != "tokenizer":
        find_template(config.dataset.template)
    try:
        training_arguments(config, "unused")
    except (TypeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"train.training_arguments: {adapters.first_sentence(error)}") from error


def check_model(config: RunConfig) -> tuple[Any, str]:
    """The base model's tokenizer and the chat template. Raises SettingsError if they, or the adapter, do not fit it."""
    adapters.adapter_plan(config.model, adapters.read_config(config.model))
    tokenizer = adapters.read_tokenizer(config.model)
    return tokenizer, read_template(config.dataset, tokenizer)


@dataclass(frozen=True)
class Inputs:
    """What a run was found to have, besides weights."""

    template: str
    """The chat template."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprints of the rows, of the held-out ones as `held_out`; none where only the clients have rows."""
    idle_gpus: str | None = None
    """That GPUs of this machine stay idle, and what to do about it."""

    @property
    def for_results(self) -> dict[str, Any]:
        """What of it results.json says."""
        return {"held_out_rows_trained_on": self.data.get("held_out", {}).get("also_trained_on", 0)}

    @property
    def warnings(self) -> list[str]:
        """What the user should know before the first round."""
        shared = self.for_results["held_out_rows_trained_on"]
        text = f"dataset.eval_name: {shared} of its rows are trained on too: they are in dataset.name as well"
        return ([text] if shared else []) + ([self.idle_gpus] if self.idle_gpus else [])


def check_inputs(config: RunConfig) -> Inputs:
    """Load what the clients will need besides weights, once.

    Raises:
        SettingsError: if model, tokenizer or data are missing, do not fit, or are too few for the clients.
    """
    tokenizer, template = check_model(config)
    rows = load_rows(config.dataset)
    check_template(config, tokenizer, template, rows.select(range(1)))
    partition_rows(rows, config.dataset, config.num_clients, config.seed)
    facts = data_facts(rows)
    if config.dataset.eval_name:
        held_out = load_eval_rows(config.dataset)
        if not any(text_of(output).strip() for output in held_out["output"]):
            raise SettingsError(f"dataset.eval_name={config.dataset.eval_name}: none of its rows has an output")
        column = config.dataset.category_column
        if column not in ("", "category", *held_out.column_names):
            raise SettingsError(
                f"dataset.category_column={column}: {config.dataset.eval_name} has {', '.join(held_out.column_names)}"
            )
        facts |= {"held_out": data_facts(held_out) | {"also_trained_on": len(shared_rows(rows, held_out))}}
    return Inputs(template, facts, idle_gpus(config))


def check_template(config: RunConfig, tokenizer: Any, template: str, rows: Dataset) -> None:
    """Raise SettingsError if the chat template, which is a program, makes no tokens of `rows`."""
    try:
        tokenize_rows(rows, tokenizer, template, config.train.seq_length)
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError(
            f"dataset.template={config.dataset.template}: makes no prompt ({shortened(error, 200)}); choose another, "
            "such as dataset.template=alpaca"
        ) from error


def shared_rows(rows: Dataset, held_out: Dataset) -> list[int]:
    """Numbers of the held-out rows that are among `rows` too, word for word."""
    trained_on = set(zip(*(map(text_of, rows[column]) for column in COLUMNS), strict=True))
    measured = zip(*(map(text_of, held_out[column]) for column in COLUMNS), strict=True)
    return [number for number, row in enumerate(measured) if row in trained_on]


def data_facts(rows: Dataset) -> dict[str, Any]:
    """What tells rows apart from others: their number, and a digest of up to 1,000 of them."""
    sample = rows.select(range(0, len(rows), max(1, len(rows) // 1000)))
    text = json.dumps([[row[column] for column in COLUMNS] for row in sample], default=str)
    return {"rows": len(rows), "sha256_of_sample": hashlib.sha256(text.encode()).hexdigest()}


def plan(config: RunConfig, folder: Path) -> dict[str, str]:
    """What the run will do and take, for people; what only the network could tell is said to be unknown."""
    steps = config.train.training_arguments["max_steps"]
    trained = config.clients_per_round * config.num_rounds
    lines = {
        "base model": f"{config.model.name}, quantization {config.model.quantization}",
        "data": describe_data(config),
        "rounds": f"{config.num_rounds}, {config.clients_per_round} of {config.num_clients} clients in each "
        f"({config.strategy['_target_'].rsplit('.', 1)[-1]})",
        "optimizer steps": f"{trained * steps}: {steps} for a client in a round, {config.batch_size} rows each",
        "learning rate": f"{config.train.learning_rate_max:g} falling to {config.train.learning_rate_min:g}",
    }
    if measured := describe_evaluation(config):
        lines["held-out loss"] = measured
    lines |= plan_sizes(config)
    lines["checkpoints"] = describe_checkpoints(config)
    if config.train.early_stop_rounds:
        lines["ends early"] = f"when the held-out loss was lowest {config.train.early_stop_rounds} rounds ago"
    lines["good replies"] = (
        f"at least {config.sampling.min_replies} a round, in {config.sampling.round_retries + 1} trials"
    )
    lines["workers"] = f"{config.client_resources.num_cpus} CPU cores, {config.client_resources.num_gpus:g} GPUs each"
    lines["this machine"] = fits_here(config)
    lines["results"] = str(folder)
    return lines


def describe_evaluation(config: RunConfig) -> str:
    dataset, share, parts = config.dataset, config.sampling.fraction_evaluate, []
    if dataset.eval_name:
        if local_rows(dataset.eval_name, "dataset.eval_name"):
            load_eval_rows(dataset)
        parts.append(f"of {dataset.eval_name} before and after the run and every {config.evaluate.every_rounds} rounds")
    if share:
        count = max(1, share_of(config.num_clients, share))
        parts.append(f"of {dataset.holdout:.0%} of the rows of {count} clients after every round")
    return ", and ".join(parts)


def describe_checkpoints(config: RunConfig) -> str:
    count = -(-config.num_rounds // config.train.save_every_round)
    kept = min(count, config.train.keep_checkpoints or count)
    best = " and whenever the held-out loss is lowest" if config.is_measured else ""
    return (
        f"every {config.train.save_every_round} rounds{best}; {kept} of {count} kept{', and the best' if best else ''}"
    )


def describe_data(config: RunConfig) -> str:
    kind = partitioner_class(config.dataset).__name__
    if local_rows(config.dataset.name) is None:
        return f"{config.dataset.name} ({kind}); number of rows {UNKNOWN}"
    rows = load_rows(config.dataset)
    partition_rows(rows, config.dataset, config.num_clients, config.seed)
    return f"{config.dataset.name}, {len(rows)} rows, {kind}"


def plan_sizes(config: RunConfig) -> dict[str, str]:
    """Adapter, traffic and memory, if the base model's shapes are on this machine; then its tokenizer fits too."""
    if hub.cached_model(config.model.name, code=config.model.trust_remote_code) is None:
        return dict.fromkeys(("adapter", "bytes down and up", "memory of a step"), UNKNOWN)
    size = sizes(adapters.read_config(config.model, offline=True), config)
    if local_path(config.model.name):  # of the Hub's there may be only a part
        tokenizer = adapters.read_tokenizer(config.model, offline=True)
        row = Dataset.from_dict({column: ["x"] for column in COLUMNS})
        check_template(config, tokenizer, read_template(config.dataset, tokenizer), row)
    check_budget(config, size.payload_bytes, size.once_bytes)
    rounds, sent, returned = traffic(config, size)
    early = "" if rounds == config.num_rounds else f"; strategy.max_bytes ends the run after round {rounds}"
    return {
        "adapter": f"{bytes_text(4 * size.adapter)}, {size.adapter:,} parameters of {size.linear + size.other:,}",
        "bytes down and up": f"{bytes_text(size.payload_bytes * sent)} and "
        f"{bytes_text(size.payload_bytes * returned + size.once_bytes)} in all, "
        f"{bytes_text(size.payload_bytes)} an adapter{early}",
        "memory of a step": describe_memory(config, size),
    }


def traffic(config: RunConfig, size: Sizes) -> tuple[int, int, int]:
    """Rounds that `strategy.max_bytes` allows, and adapters sent down and up in them, if no client fails."""
    most = config.sampling.max_bytes or float("inf")
    sent, returned, count = config.evaluations_after(0, config.num_clients), 0, config.clients_per_round
    for number in range(1, config.num_rounds + 1):
        down = count + config.evaluations_after(number, config.num_clients)
        if (sent + returned + down + count) * size.payload_bytes + size.once_bytes > most:
            measured = number == 1 or config.evaluates_after(number - 1) or not config.dataset.eval_name
            last = not measured and (sent + returned + 1) * size.payload_bytes + size.once_bytes <= most
            return number - 1, sent + last, returned
        sent, returned = sent + down, returned + count
    return config.num_rounds, sent, returned


def fits_here(config: RunConfig) -> str:
    try:
        check_machine(config)
    except SettingsError as error:
        return f"cannot run it: {error}"
    return idle_gpus(config) or "has room for at least one worker"


def print_plan(lines: dict[str, Any], write: Any) -> None:
    width = max(map(len, lines))
    for name, text in lines.items():
        write(f"{name:<{width}}  {text}")
