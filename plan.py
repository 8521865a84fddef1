"""Before the start: check that a run can work, and say what it will take. Loads no base model."""

import os
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedConfig

import model as adapters
from config import RunConfig, SettingsError, share_of
from dataset import find_template, load_rows, partition_rows, partitioner_class, read_template, tokenize_rows
from engine import check_machine
from strategy import make_strategy
from training import training_arguments
from transfer import payload_bytes
from utils import bytes_text, local_path

UNKNOWN = "unknown without the network"
BYTES_PER_WEIGHT = {"4": 0.516, "8": 1.0, "none": 2.0}  # nf4 with double quantization: 4.127 bits a weight


def check_names(config: RunConfig) -> None:
    """Raise SettingsError for classes and arguments that do not exist. Reads no data and no network."""
    make_strategy(config)
    partitioner_class(config.dataset)
    adapters.lora_config(config.model)
    if config.dataset.template != "tokenizer":
        find_template(config.dataset.template)
    try:
        training_arguments(config, "unused")
    except (TypeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"train.training_arguments: {adapters.first_sentence(error)}") from error


def check_inputs(config: RunConfig) -> str:
    """Load what the clients will need besides weights, once; returns the chat template.

    Raises:
        SettingsError: if model, tokenizer or data are missing, do not fit, or are too few for the clients.
    """
    base = adapters.read_config(config.model)
    if not weights_present(config):
        raise SettingsError(f"model.name={config.model.name}: this folder has no weights (*.safetensors or *.bin)")
    adapters.adapter_shapes(base, adapters.lora_config(config.model))
    tokenizer = adapters.read_tokenizer(config.model)
    template = read_template(config.dataset, tokenizer)
    rows = load_rows(config.dataset)
    try:
        tokenize_rows(rows.select(range(1)), tokenizer, template, config.train.seq_length)
    except TemplateError as error:
        raise SettingsError(f"dataset.template={config.dataset.template}: {error}") from error
    partition_rows(rows, config.dataset, config.num_clients, config.seed)
    return template


def weights_present(config: RunConfig) -> bool:
    folder = local_path(config.model.name)
    return folder is None or any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())


def check_folder(folder: Path, *, fresh: bool = False) -> None:
    """Raise SettingsError if results can not be written into `folder`, or another run's are there.

    Args:
        fresh: clear away what an unfinished run left there.
    """
    if fresh:
        for old in [*folder.glob("peft_*"), *folder.glob(".tokens")]:
            shutil.rmtree(old)
        for file in [folder / "metrics.jsonl", folder / "error.txt", *folder.glob("events.out.tfevents.*")]:
            file.unlink(missing_ok=True)
    elif any(folder.glob("peft_*")) or any((folder / name).exists() for name in ("settings.json", "metrics.jsonl")):
        raise SettingsError(f"hydra.run.dir={folder}: holds the results of another run; choose another folder")
    try:
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"hydra.run.dir={folder}: can not be written ({error.strerror}); choose another folder"
        ) from error


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a base model tell: parameters of its linear layers and of the rest, adapter, widths."""

    linear: int
    other: int
    adapter: int
    payload_bytes: int
    """The adapter as it travels, in the form that `transfer` names."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


def sizes(base: PreTrainedConfig, config: RunConfig) -> Sizes:
    with torch.device("meta"):
        empty = adapters.AutoModelForCausalLM.from_config(base)
    parameters = dict(empty.named_parameters())
    linear = sum(
        weight.numel()
        for name, weight in parameters.items()
        if weight.dim() == 2 and "embed" not in name and "lm_head" not in name
    )
    shapes = adapters.adapter_shapes(base, adapters.lora_config(config.model))
    return Sizes(
        linear=linear,
        other=sum(weight.numel() for weight in parameters.values()) - linear,
        adapter=sum(prod(shape) for shape in shapes.values()),
        payload_bytes=payload_bytes(shapes, config.transfer),
        layers=base.num_hidden_layers,
        hidden=base.hidden_size,
        intermediate=getattr(base, "intermediate_size", 4 * base.hidden_size),
        vocabulary=base.vocab_size,
    )


def memory_bytes(size: Sizes, config: RunConfig) -> float:
    """Estimated peak memory of a client's training step.

    Frozen weights; adapter with gradient and two Adam moments in float32; the activations that
    checkpointing keeps (one hidden state a layer), or all of them without it; the working set of the
    one layer that is recomputed; a tile of logits. Within 15% of FACTS' floors for OpenLLaMA.
    """
    tokens = min(config.train.micro_batch_size, config.batch_size) * config.train.seq_length
    weights = size.linear * BYTES_PER_WEIGHT[config.model.quantization] + 2 * size.other
    layer = tokens * 2 * (12 * size.hidden + 8 * size.intermediate)
    checkpointed = config.train.training_arguments.get("gradient_checkpointing", False)
    kept = size.layers * tokens * 2 * size.hidden if checkpointed else size.layers * layer / 2
    return weights + 16 * size.adapter + kept + layer + 0.25e9 * min(1.0, size.vocabulary / 32000)


def free_memory() -> tuple[str, float]:
    """Where clients train here, and how many bytes are free there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[0])
    return "CPU, main memory", float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


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
    evaluated = share_of(config.num_clients, config.sampling.fraction_evaluate) * config.num_rounds
    lines |= plan_sizes(config, trained + evaluated, trained)
    lines["workers"] = f"{config.client_resources.num_cpus} CPU cores, {config.client_resources.num_gpus:g} GPUs each"
    lines["this machine"] = fits_here(config)
    lines["results"] = str(folder)
    return lines


def describe_data(config: RunConfig) -> str:
    kind = partitioner_class(config.dataset).__name__
    if local_path(config.dataset.name) is None:
        return f"{config.dataset.name} ({kind}); number of rows {UNKNOWN}"
    rows = load_rows(config.dataset)
    partition_rows(rows, config.dataset, config.num_clients, config.seed)
    return f"{config.dataset.name}, {len(rows)} rows, {kind}"


def plan_sizes(config: RunConfig, sent: int, returned: int) -> dict[str, str]:
    """Adapter, traffic of so many adapters down and up, and memory, as far as the shapes are to be had offline."""
    try:
        size = sizes(adapters.read_config(config.model, offline=True), config)
    except SettingsError as error:
        if local_path(config.model.name):
            raise error
        return dict.fromkeys(("adapter", "bytes down and up", "memory per client"), UNKNOWN)
    where, free = free_memory()
    return {
        "adapter": f"{bytes_text(4 * size.adapter)}, {size.adapter:,} parameters of {size.linear + size.other:,}",
        "bytes down and up": f"{bytes_text(size.payload_bytes * sent)} and "
        f"{bytes_text(size.payload_bytes * returned)} in all, {bytes_text(size.payload_bytes)} an adapter",
        "memory per client": f"about {bytes_text(memory_bytes(size, config))}; free here: {bytes_text(free)} ({where})",
    }


def fits_here(config: RunConfig) -> str:
    try:
        check_machine(config)
    except SettingsError as error:
        return f"can not run it: {error}"
    return "has room for at least one worker"


def print_plan(lines: dict[str, Any], write: Any) -> None:
    width = max(map(len, lines))
    for name, text in lines.items():
        write(f"{name:<{width}}  {text}")
