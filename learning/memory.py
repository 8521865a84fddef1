"""What a client takes in memory, estimated from the base model's shapes, what it may take, and how to make it less."""

import os
from dataclasses import dataclass, replace
from math import inf, isinf, prod
from typing import NamedTuple

import numpy as np
import psutil
import torch
from transformers import PreTrainedConfig
from transformers.configuration_utils import get_head_shapes

import model as adapters
from exchange.transfer import payload_bytes
from learning.head import inner_width, layer_values, positions_at_once
from machine import gpus
from settings.schema import RunConfig
from utils import bytes_text, forget_peak, peak_resident_bytes

BYTES_PER_WEIGHT = {"4": 0.516, "8": 1.0}  # nf4 with double quantization: 4.127 bits a weight
OWN_BYTES = 1e9  # of a process without a model: libraries in main memory, CUDA's context on a GPU
MOST = 0.9  # of what is there: an estimate may be wrong, and memory is in pieces
CHECKPOINTING = "gradient_checkpointing"


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a base model tell: parameters of its linear layers and of the rest, adapter, widths."""

    linear: int
    other: int
    adapter: int
    payload_bytes: int  # the adapter as it travels, in the form that `transfer` names
    once_bytes: int  # that one client sends before the first round: tensors that start from the base weights
    adapted: int  # inputs of all layers that LoRA is in
    keys_and_values: int  # of a token, in all layers
    text: PreTrainedConfig  # the shapes of the language part


def sizes(base: PreTrainedConfig, config: RunConfig) -> Sizes:
    empty, text = adapters.empty_model(base, config.model), base.get_text_config()
    parameters = dict(empty.named_parameters())
    tables = {name for name in parameters if "embed" in name or "lm_head" in name}
    linear = sum(weight.numel() for name, weight in parameters.items() if weight.dim() == 2 and name not in tables)
    shapes = adapters.adapter_shapes(empty, adapters.lora_config(config.model, empty))
    return Sizes(
        linear=linear,
        other=sum(weight.numel() for weight in parameters.values()) - linear,
        adapter=sum(prod(shape) for shape in shapes.values()),
        payload_bytes=payload_bytes(shapes, config.transfer),
        once_bytes=adapters.starts_from_base(shapes) * payload_bytes(shapes, "fp32"),
        adapted=sum(shape[1] for name, shape in shapes.items() if "lora_A" in name),
        keys_and_values=keys_and_values(text),
        text=text,
    )


def keys_and_values(text: PreTrainedConfig) -> int:
    """Of a token, in all layers, each of which may have heads of its own; 0 without attention (Mamba)."""
    try:
        heads, widths = get_head_shapes(text)
    except AttributeError:
        return 0
    return 2 * int(np.broadcast_to(np.multiply(heads, widths), text.num_hidden_layers).sum())


def memory_bytes(size: Sizes, config: RunConfig) -> float:
    """Estimated peak memory of a client, in training, evaluation and answering.

    Frozen weights; adapter with gradient and two Adam moments in float32; then whatever is most: what a training pass
    keeps for its way back and works on, or the keys and values of answers. For OpenLLaMA that is within 15% of the
    computed floors in docs/performance.md.
    """
    tokens = config.train.tokens_at_once
    wide = adapters.compute_dtype("cuda" if config.client_resources.num_gpus else "cpu").itemsize
    weights = size.linear * BYTES_PER_WEIGHT.get(config.model.quantization, wide) + wide * size.other
    layer = tokens * wide * layer_values(size.text)
    if config.model.quantization != "none":
        layer += wide * size.text.hidden_size * inner_width(size.text)  # a weight that is dequantized
    logits = 6 * wide * min(tokens, positions_at_once(size.text, tokens)) * size.text.vocab_size
    if config.train.training_arguments.get(CHECKPOINTING):
        training = size.text.num_hidden_layers * tokens * wide * size.text.hidden_size + max(layer, logits)
    else:
        training = tokens * kept_bytes(size, config.model.quantization, wide) + max(layer / 2, logits)
    answering = tokens * wide * size.keys_and_values + layer / 2 if config.evaluate.answers else 0.0
    return weights + 16 * size.adapter + max(training, answering)


def kept_bytes(size: Sizes, quantization: str, wide: int) -> float:
    """What all layers keep of a token for the way back: inputs of what has a gradient, or is not linear.

    Of a layer two norms in float32; query, key, value and result of attention; three of the gated unit's width; inputs
    of LoRA with their dropout. In 8 bits bitsandbytes keeps the inputs of linear layers as well.
    """
    hidden, inner = size.text.hidden_size, inner_width(size.text)
    values = 2 * hidden + 3 * inner + (2 * hidden + inner if quantization == "8" else 0)
    of_layers = size.text.num_hidden_layers * (2 * 4 * hidden + wide * values)
    return of_layers + wide * (size.keys_and_values + 1.5 * size.adapted)


class Place(NamedTuple):
    """Where a client trains here."""

    name: str
    total: float  # bytes of memory
    free: float  # bytes that this process has, or could have now


def place(config: RunConfig) -> Place:
    """The GPU that this process has, the fullest of those that its workers will get, or main memory.

    Asks the driver of the GPU: CUDA is not initialised by that.
    """
    if config.client_resources.num_gpus and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return Place(torch.cuda.get_device_name(), float(total), float(free + torch.cuda.memory_reserved()))
    if config.client_resources.num_gpus and (card := gpus.fullest()):
        return Place(card.name, card.total_bytes, card.free_bytes)
    memory, own = psutil.virtual_memory(), psutil.Process().memory_info().rss
    return Place("CPU, main memory", float(memory.total), float(memory.available + own))


def budget_bytes(config: RunConfig, here: Place) -> float:
    """What one worker may take: workers that share a GPU, or the cores of a machine, share its memory."""
    share = config.client_resources.num_gpus or config.client_resources.num_cpus / (os.cpu_count() or 1)
    return MOST * min(here.free, here.total * min(1.0, share)) - OWN_BYTES


def settled(config: RunConfig) -> RunConfig:
    """`config` with `gradient_checkpointing: auto` decided for this process."""
    if config.train.training_arguments.get(CHECKPOINTING) != "auto":
        return config
    return decided(config, sizes(adapters.read_config(config.model, offline=True), config), place(config))


def decided(config: RunConfig, size: Sizes, here: Place) -> RunConfig:
    """As `settled`: checkpointing is off where memory allows, which is a third faster."""
    fits = memory_bytes(size, checkpointed(config, False)) <= budget_bytes(config, here)
    return checkpointed(config, not fits)


def checkpointed(config: RunConfig, is_on: bool) -> RunConfig:
    arguments = config.train.training_arguments | {CHECKPOINTING: is_on}
    return replace(config, train=replace(config.train, training_arguments=arguments))


def describe_memory(config: RunConfig, size: Sizes) -> str:
    """For the plan: what a client takes, what it may take, whether checkpointing is on, and why."""
    elsewhere = Place(f"ray.address={config.ray.address}", inf, inf) if config.ray.address else None
    here, is_open = elsewhere or place(config), config.train.training_arguments.get(CHECKPOINTING) == "auto"
    chosen, budget = decided(config, size, here) if is_open else config, budget_bytes(config, here)
    needed, without = memory_bytes(size, chosen), memory_bytes(size, checkpointed(config, False))
    text = f"about {bytes_text(needed)}"
    if isinf(budget):
        how = " without checkpointing" if is_open else ""
        return f"{text}{how}; how much a worker may take is not known before it starts ({here.name})"
    text += f"; for one worker there are {bytes_text(max(0.0, budget))} here ({here.name})"
    if is_open:
        is_on = chosen.train.training_arguments[CHECKPOINTING]
        text += f"; checkpointing is on, without it takes {bytes_text(without)}" if is_on else "; checkpointing is off"
    if needed > budget:
        text += f"; IT DOES NOT FIT, it helps: {advice_on(chosen, size)}"
    return text


def advice(config: RunConfig) -> str:
    """The settings that make a client take less memory, each with what it saves, most first."""
    return advice_on(settled(config), sizes(adapters.read_config(config.model, offline=True), config))


def advice_on(config: RunConfig, size: Sizes) -> str:
    train, now = config.train, memory_bytes(size, config)
    shorter = max(16, train.seq_length // 2)  # 16 is the least
    less = {
        "train.training_arguments.gradient_checkpointing=true": checkpointed(config, True),
        "train.micro_batch_size=1": replace(config, train=replace(train, micro_batch_size=1)),
        f"train.seq_length={shorter}": replace(config, train=replace(train, seq_length=shorter)),
        "model.quantization=4": replace(config, model=replace(config.model, quantization="4")),
    }
    saved = {setting: now - memory_bytes(size, changed) for setting, changed in less.items()}
    if 0 < config.client_resources.num_gpus < 1:
        saved["client_resources.num_gpus=1"] = (1 / config.client_resources.num_gpus - 1) * now
    best = sorted(saved, key=lambda setting: -saved[setting])
    return ", ".join(f"{key} (about {bytes_text(saved[key])} less)" for key in best if saved[key] > 0)


def start_peak(device: torch.device) -> None:
    """From here on `peak` counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    forget_peak()


def peak(device: torch.device) -> dict[str, int]:
    """Most memory that was held on `device`, and was taken from others for it; in main memory that is the same."""
    if device.type == "cuda":
        held, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    else:
        held = reserved = peak_resident_bytes()
    return {"peak_memory_bytes": held, "reserved_memory_bytes": reserved}
