"""Base model and adapter as one plain model, summed and written in pieces: no whole model has to fit into memory.

transformers maps the stored weights into memory and reads none before it is used. PEFT sums one layer after the other,
in float32; each sum goes to a file beside the result, and is mapped in turn until transformers writes the shards.
"""

import argparse
import ctypes
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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


def merge(checkpoint: Path, options: argparse.Namespace) -> None:
    """Write the adapter merged into the unquantized base model, with tokenizer and chat template.

    The sum is taken in float32: bfloat16 weights are too coarse for what an adapter adds.
    """
    answerer = Answerer(checkpoint, options)
    cfg, tokenizer = answerer.tuned.cfg, answerer.tokenizer
    if cfg.quantization != "none":
        raise SettingsError(
            f"--merge={options.merge}: the base model {cfg.name} is stored in {cfg.quantization} bits, and a sum needs "
            "plain weights; name the unquantized model with --base"
        )
    tokenizer.chat_template = answerer.template
    kind = getattr(torch, options.merge_dtype)
    folder = adapters.base_folder(cfg)
    need = needed(adapters.empty_model(adapters.described(cfg, folder), cfg), kind)
    print(f"merging into {bytes_text(need.file)}: {need}", flush=True)
    need.check_disk(options.merge)
    model = answerer.tuned.load(stored_dtype(folder))
    untie(model)
    with writing("merge", options.merge):
        options.merge.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pieces-", dir=options.merge) as pieces:
        merged = summed(model, Pieces(Path(pieces), kind, options.merge))
        merged.generation_config = generation_settings(merged.generation_config, sorted(end_ids(tokenizer)))
        with writing("merge", options.merge):
            merged.save_pretrained(options.merge, max_shard_size=need.shard)
    with writing("merge", options.merge):
        tokenizer.save_pretrained(options.merge)
        let_others_read(*options.merge.glob("*.safetensors"))
    print(f"merged model: {options.merge}")


# --- what it takes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Bytes that a merge takes: of the file that it writes, and of memory."""

    file: int
    shard: int
    layer: int
    """The largest, in float32."""

    @property
    def memory(self) -> int:
        """What must not be taken away; besides it, parts of files are kept in memory while there is room."""
        return BASIS_BYTES + 2 * self.layer + self.shard

    def __str__(self) -> str:
        return (
            f"needs about {bytes_text(self.memory)} of memory, and {bytes_text(2 * self.file)} of disk until it is done"
        )

    def check_disk(self, folder: Path) -> None:
        """Raise SettingsError if the disk below `folder` has no room for it."""
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if (free := shutil.disk_usage(place).free) < 2 * self.file:
            raise SettingsError(
                f"--merge={folder}: {self}; the disk has {bytes_text(free)} left; choose a folder on another, or "
                "--merge-dtype=bfloat16 for half of it"
            )


def needed(empty: Any, kind: torch.dtype) -> Need:
    """What merging into the model that is `empty` here takes."""
    sizes = [parameter.numel() for parameter in empty.parameters()]
    file = sum(sizes) * kind.itemsize
    return Need(file, max(LEAST_SHARD_BYTES, file // SHARDS), 4 * max(sizes))


def stored_dtype(folder: Path) -> torch.dtype | str:
    """In what the base model's weights have to be loaded for none of their digits to be lost."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            if any(opened.get_slice(name).get_dtype() == "F32" for name in opened.keys()):  # noqa: SIM118
                return torch.float32
    return "auto"


# --- the sum, layer by layer ----------------------------------------------------------------------


@dataclass
class Pieces:
    """Tensors in files, mapped into memory: the system reads them when they are used, and forgets them at will."""

    folder: Path
    kind: torch.dtype
    result: Path
    count: int = 0

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor from a file; floating-point numbers as `kind`."""
        if not tensor.numel():
            return tensor
        value = (tensor.to(self.kind) if tensor.is_floating_point() else tensor).contiguous()
        self.count += 1
        file = self.folder / str(self.count)
        with writing("merge", self.result), file.open("wb") as opened:
            opened.write(value.view(-1).view(torch.uint8).numpy().data)
        kept = torch.from_file(str(file), shared=False, size=value.numel(), dtype=value.dtype)
        return kept.view(value.shape)


def summed(model: Any, pieces: Pieces) -> Any:
    """`model` without its adapter, which is in its weights; those are in `pieces`."""
    advice = "; load it beside its base model instead"
    done: set[int] = set()
    with explained(f"--merge={pieces.result}: PEFT cannot merge this adapter", advice):  # such as LoRA with biases
        for base, layers in tuned_layers(model):
            for parameter in base.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float32, copy=True)  # what is mapped stays as it is
            for layer in layers:
                layer.merge()
            for parameter in base.parameters(recurse=False):
                parameter.data = pieces.put(parameter.data)
                done.add(id(parameter))
            give_back()
        merged = model.merge_and_unload()
    for tensor in (*merged.parameters(), *merged.buffers()):
        if id(tensor) not in done:
            tensor.data = pieces.put(tensor.data)
    return merged


def give_back() -> None:
    """Return freed memory to the system, of which glibc keeps blocks of tens of megabytes for later."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def tuned_layers(model: Any) -> Iterator[tuple[torch.nn.Module, list[BaseTunerLayer]]]:
    """The layers of the base model that an adapter changes, each with what changes it."""
    found: dict[torch.nn.Module, list[BaseTunerLayer]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            found[module.get_base_layer()].append(module)
    yield from found.items()


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
