"""What a client's training step takes in memory, estimated from the base model's shapes, and how to make it less."""

import os
from dataclasses import dataclass, replace
from math import prod

import torch
from transformers import PreTrainedConfig

import model as adapters
from exchange.transfer import payload_bytes
from settings.schema import RunConfig
from utils import bytes_text

BYTES_PER_WEIGHT = {"4": 0.516, "8": 1.0}  # nf4 with double quantization: 4.127 bits a weight


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a base model tell: parameters of its linear layers and of the rest, adapter, widths."""

    linear: int
    other: int
    adapter: int
    payload_bytes: int
    """The adapter as it travels, in the form that `transfer` names."""
    once_bytes: int
    """What one client sends before the first round: tensors that start from the base weights (DoRA's magnitudes)."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


def sizes(base: PreTrainedConfig, config: RunConfig) -> Sizes:
    empty, text = adapters.empty_model(base, config.model), base.get_text_config()
    parameters = dict(empty.named_parameters())
    linear = sum(
        weight.numel()
        for name, weight in parameters.items()
        if weight.dim() == 2 and "embed" not in name and "lm_head" not in name
    )
    shapes = adapters.adapter_shapes(empty, adapters.lora_config(config.model, empty))
    return Sizes(
        linear=linear,
        other=sum(weight.numel() for weight in parameters.values()) - linear,
        adapter=sum(prod(shape) for shape in shapes.values()),
        payload_bytes=payload_bytes(shapes, config.transfer),
        once_bytes=adapters.starts_from_base(shapes) * payload_bytes(shapes, "fp32"),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        vocabulary=text.vocab_size,
    )


def memory_bytes(size: Sizes, config: RunConfig) -> float:
    """Estimated peak memory of a client's training step.

    Frozen weights; adapter with gradient and two Adam moments in float32; the activations that
    checkpointing keeps (one hidden state a layer), or all of them without it; the working set of the
    one layer that is recomputed; a tile of logits. Within 15% of FACTS' floors for OpenLLaMA.
    """
    tokens = config.train.tokens_at_once
    wide = adapters.compute_dtype().itemsize
    weights = size.linear * BYTES_PER_WEIGHT.get(config.model.quantization, wide) + wide * size.other
    layer = tokens * wide * (12 * size.hidden + 8 * size.intermediate)
    checkpointed = config.train.training_arguments.get("gradient_checkpointing", False)
    kept = size.layers * tokens * wide * size.hidden if checkpointed else size.layers * layer / 2
    return weights + 16 * size.adapter + kept + layer + 0.25e9 * min(1.0, size.vocabulary / 32000)


def free_memory() -> tuple[str, float]:
    """Where clients train here, and how many bytes are free there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[0])
    return "CPU, main memory", float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def advice(config: RunConfig) -> str:
    """The settings that make a client's step take less memory, each with what it saves, most first."""
    size = sizes(adapters.read_config(config.model, offline=True), config)
    train, now = config.train, memory_bytes(size, config)
    checkpointing = {**train.training_arguments, "gradient_checkpointing": True}
    shorter = max(16, train.seq_length // 2)  # 16 is the least
    in_training = {
        "train.training_arguments.gradient_checkpointing=true": replace(train, training_arguments=checkpointing),
        "train.micro_batch_size=1": replace(train, micro_batch_size=1),
        f"train.seq_length={shorter}": replace(train, seq_length=shorter),
    }
    less = {setting: replace(config, train=changed) for setting, changed in in_training.items()}
    less["model.quantization=4"] = replace(config, model=replace(config.model, quantization="4"))
    saved = {setting: now - memory_bytes(size, changed) for setting, changed in less.items()}
    if 0 < config.client_resources.num_gpus < 1:
        saved["client_resources.num_gpus=1"] = (1 / config.client_resources.num_gpus - 1) * now
    best = sorted((setting for setting in saved if saved[setting] > 0), key=lambda setting: -saved[setting])
    return ", ".join(f"{setting} (about {bytes_text(saved[setting])} less)" for setting in best)
