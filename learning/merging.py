"""Base model and adapter as one plain model, summed and written in pieces: no whole model has to fit into memory.

transformers maps the stored weights into memory and reads none before it is used. PEFT sums one layer after the other,
in float32; each sum goes to a file beside the result, and is mapped in turn until transformers writes the shards.
"""

import argparse
import ctypes
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import GenerationConfig

import model as adapters
from dataset import end_ids
from learning.answering import Answerer, writing
from learning.tuned import explained
from settings.schema import SettingsError
from utils import bytes_text, let_others_read

SHARDS, LEAST_SHARD_BYTES = 20, 100_000_000  # of the result: one of them is in memory while it is written
BASIS_BYTES = 700_000_000  # of a process with the model libraries


def merge(answerer: Answerer, options: argparse.Namespace) -> None:
    """Write base model and adapter as one model, with tokenizer and chat template.

    The sum is taken in float32: bfloat16 weights are too coarse for what an adapter adds.
    """
    cfg, tokenizer = answerer.tuned.cfg, answerer.tokenizer
    if cfg.quantization != "none":
        raise SettingsError(
            f"--merge={options.merge}: the base model {cfg.name} is stored in {cfg.quantization} bits, and a sum needs "
            "plain weights; name the unquantized model with --base"
        )
    tokenizer.chat_template = answerer.template
    kind = getattr(torch, options.merge_dtype)
    folder = adapters.base_folder(cfg)
    empty = adapters.empty_model(adapters.described(cfg, folder), cfg)
    shard_bytes = check_room(options.merge, [parameter.numel() for parameter in empty.parameters()], kind)
    model = answerer.tuned.load(stored_dtype(folder))
    untie(model)
    with writing("merge", options.merge):
        options.merge.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".pieces-", dir=options.merge) as pieces:
        merged = summed(model, Path(pieces), kind)
        merged.generation_config = generation_settings(merged.generation_config, sorted(end_ids(tokenizer)))
        with writing("merge", options.merge):
            merged.save_pretrained(options.merge, max_shard_size=shard_bytes)
            tokenizer.save_pretrained(options.merge)
            let_others_read(*options.merge.glob("*.safetensors"))
    print(f"merged model: {options.merge}")


# --- what it takes --------------------------------------------------------------------------------


def check_room(folder: Path, sizes: Sequence[int], kind: torch.dtype) -> int:
    """Say what merging parameters of these `sizes` into `folder` takes; returns the bytes of one file of the result.

    Raises SettingsError if the disk has no room for it.
    """
    whole = sum(sizes) * kind.itemsize
    shard = max(LEAST_SHARD_BYTES, whole // SHARDS)
    memory = BASIS_BYTES + 2 * 4 * max(sizes) + shard  # besides it, parts of files are kept there while there is room
    needs = f"needs about {bytes_text(memory)} of memory, and {bytes_text(2 * whole)} of disk until it is done"
    print(f"merging into {bytes_text(whole)}: {needs}", flush=True)
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if (free := shutil.disk_usage(place).free) < 2 * whole:
        raise SettingsError(
            f"--merge={folder}: {needs}; the disk has {bytes_text(free)} left; choose a folder on another, or "
            "--merge-dtype=bfloat16 for half of it"
        )
    return shard


def stored_dtype(folder: Path) -> torch.dtype | str:
    """In what the base model's weights have to be loaded for none of their digits to be lost."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            if any(opened.get_slice(name).get_dtype() == "F32" for name in opened.keys()):  # noqa: SIM118
                return torch.float32
    return "auto"


# --- the sum, layer by layer ----------------------------------------------------------------------


def mapped(tensor: torch.Tensor, folder: Path, kind: torch.dtype) -> torch.Tensor:
    """The same tensor, floating-point numbers as `kind`, from a new file in `folder` that is mapped into memory.

    The system reads such a file when it is used, and forgets it at will.
    """
    if not tensor.numel():
        return tensor
    value = (tensor.to(kind) if tensor.is_floating_point() else tensor).contiguous()
    with writing("merge", folder.parent), NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(value.view(-1).view(torch.uint8).numpy().data)
    return torch.from_file(file.name, shared=False, size=value.numel(), dtype=value.dtype).view(value.shape)


def summed(model: Any, pieces: Path, kind: torch.dtype) -> Any:
    """`model` without its adapter, which is in its weights; those are files in the folder `pieces`, as `kind`."""
    tuned: dict[torch.nn.Module, list[BaseTunerLayer]] = defaultdict(list)  # layers, and what changes them
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            tuned[module.get_base_layer()].append(module)
    advice = "; load it beside its base model instead"
    done: set[int] = set()
    with explained(f"--merge={pieces.parent}: PEFT cannot merge this adapter", advice):  # such as LoRA with biases
        for base, layers in tuned.items():
            for parameter in base.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float32, copy=True)  # what is mapped stays as it is
            for layer in layers:
                layer.merge()
            for parameter in base.parameters(recurse=False):
                parameter.data = mapped(parameter.data, pieces, kind)
                done.add(id(parameter))
            with suppress(AttributeError):  # of freed memory glibc keeps blocks of tens of megabytes
                ctypes.CDLL(None).malloc_trim(0)
        merged = model.merge_and_unload()
    for tensor in (*merged.parameters(), *merged.buffers()):
        if id(tensor) not in done:
            tensor.data = mapped(tensor.data, pieces, kind)
    return merged


# --- around the weights ---------------------------------------------------------------------------


def generation_settings(base: GenerationConfig, ends: list[int]) -> GenerationConfig:
    """The base model's settings of generation with `ends`, or nothing but those if its own contradict each other."""
    base.eos_token_id = ends
    try:
        base.validate(strict=True)
    except ValueError:  # as with a temperature and no sampling: transformers reads such a file, and writes none
        return GenerationConfig(bos_token_id=base.bos_token_id, eos_token_id=ends)
    return base


def untie(model: Any) -> None:
    """Give an output embedding that shares its weights with the input one a copy, if LoRA changes only one of them."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    inner = [getattr(layer, "base_layer", layer) for layer in layers]
    if None not in layers and inner != layers and inner[0].weight is inner[1].weight:
        inner[1].weight = torch.nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
