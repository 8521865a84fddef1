"""Find a trained adapter, and check it against its base model's shapes, before any weights are loaded."""

import argparse
import copy
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights
from transformers import AutoTokenizer, PreTrainedConfig

import model as adapters
from dataset import read_template
from settings.schema import DatasetConfig, ModelConfig, RunError, SettingsError
from utils import is_lfs_pointer, local_path, shortened

PREFIX = "base_model.model."  # of the names in an adapter, before the base model's own
PICKLED_FILE = "adapter_model.bin"  # as older versions of PEFT wrote it
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


@contextmanager
def explained(what: str, advice: str = "") -> Iterator[None]:
    """Answer whatever a library makes of somebody's file with one line: `what` failed (why), `advice`."""
    try:
        yield
    except (SettingsError, RunError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or shortened(error, 200)
        raise SettingsError(f"{what} ({reason}){advice}") from error


@contextmanager
def told_of(checkpoint: Path) -> Iterator[None]:
    """Let errors say which adapter they are about."""
    try:
        yield
    except (SettingsError, RunError) as error:
        words = str(error).removeprefix(f"model.name={checkpoint}: ")
        raise type(error)(f"--peft-path={checkpoint}: {words}") from error


@dataclass(frozen=True)
class Tuned:
    """An adapter, and the base model and tokenizer that it is for."""

    checkpoint: Path
    cfg: ModelConfig
    lora: LoraConfig
    tokenizer: Any
    rows: int | None
    """Of the embeddings, if the adapter was trained with more or fewer tokens than the base model has."""

    def load(self, dtype: torch.dtype | str | None = None) -> Any:
        """The adapter in its base model: as it is asked, or with a `dtype` ("auto": as stored) in main memory.

        Raises:
            SettingsError: if the base model does not load, or PEFT cannot put the adapter into it.
        """
        cfg = self.cfg
        with told_of(self.checkpoint):
            base = adapters.load_weights(cfg, dtype, "cpu") if dtype else adapters.load_base(cfg)
            with explained(f"PEFT cannot put it into {cfg.name} with quantization {cfg.quantization}"):
                if self.rows:
                    resize(base, self.rows)
                if dtype:
                    self.in_float32(base)
                model = PeftModel.from_pretrained(base, str(self.checkpoint), config=self.lora)
                return adapters.fit_saved_modules(model).eval()

    def in_float32(self, base: Any) -> None:
        """Let modules that the adapter brings whole take its float32 values: PEFT makes them like the base model's."""
        for name, module in base.named_modules():
            if name.endswith(tuple(self.lora.modules_to_save or ())):
                module.float()


def find_tuned(checkpoint: Path, options: argparse.Namespace) -> Tuned:
    """Read and check an adapter, its base model's shapes and its tokenizer, before any weights are loaded."""
    with told_of(checkpoint):
        saved = read_object(checkpoint / adapters.ADAPTER_CONFIG_FILE)
        lora, cfg = read_lora(saved), base_settings(saved, checkpoint, options)
        shapes = tensor_shapes(checkpoint)
        stored = adapters.stored_bits(cfg.name, adapters.described(cfg, adapters.base_folder(cfg)))
        if options.merge or (stored and not options.quantization):
            cfg.quantization = stored or "none"
        adapters.check_device(lora.use_dora, cfg.quantization, adapters.default_device())
        base = adapters.read_config(cfg)
        is_own = any(os.path.exists(checkpoint / name) for name in TOKENIZER_FILES)
        tokenizer = read_own_tokenizer(checkpoint, base) if is_own else adapters.read_tokenizer(cfg)
        empty, known = adapters.empty_model(base, cfg), base.get_text_config().vocab_size
        layers = (empty.get_input_embeddings(), empty.get_output_embeddings())
        embeddings = [name for name, module in empty.named_modules() if any(module is layer for layer in layers)]
        rows = rows_needed(shapes, embeddings, known, tokenizer, is_own)
        adapters.check_tokenizer(str(checkpoint), tokenizer, rows)
        if rows != known:
            resize(empty, rows)
        lora.modules_to_save = saved_modules(lora, shapes, embeddings)
        expected = expected_shapes(empty, lora)
        for name in sorted(expected.keys() | shapes.keys()):
            if expected.get(name) != shapes.get(name) and not (name not in expected and is_whole(name, embeddings)):
                raise SettingsError(
                    f"does not fit the base model {cfg.name}: {name} is {shapes.get(name)}, "
                    f"the base model needs {expected.get(name)}"
                )
    return Tuned(checkpoint, cfg, lora, tokenizer, rows if rows != known else None)


# --- what lies in the adapter's folder ------------------------------------------------------------


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of the adapter's folder."""
    with explained(f"{file.name} cannot be read", "; copy the adapter again"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not an object")
        return content


def read_lora(saved: Mapping[str, Any]) -> LoraConfig:
    """The adapter's settings. Raises SettingsError for other methods than LoRA, and for what this PEFT cannot do."""
    for key, allowed in (("peft_type", ["LORA"]), ("task_type", ["CAUSAL_LM", None])):
        if saved.get(key) not in allowed:
            raise SettingsError(
                f"adapter_config.json has {key}={saved.get(key)}; only {allowed[0]} can be loaded: name another adapter"
            )
    known = {field.name for field in fields(LoraConfig) if field.init}
    for key in sorted(saved.keys() - known):
        if saved[key]:  # what is off has no effect
            raise SettingsError(
                f"adapter_config.json has {key}={shortened(saved[key], 60)}, which PEFT {peft.__version__} does not "
                "know: another version saved it; save it with this one, or remove the field if the adapter works "
                "without it"
            )
    with explained("adapter_config.json has impossible settings"):
        lora = LoraConfig(**{key: value for key, value in saved.items() if key in known - {"runtime_config"}})
        names = lora.modules_to_save or []
        if not isinstance(names, list | set) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"modules_to_save={names} is no list of names")
        return lora


def base_settings(saved: Mapping[str, Any], checkpoint: Path, options: argparse.Namespace) -> ModelConfig:
    """The base model of an adapter, quantized as in training; unquantized if the adapter came from elsewhere."""
    name, revision = saved.get("base_model_name_or_path"), saved.get("revision")
    if not options.base and (not isinstance(name, str) or not name):
        raise SettingsError(f"adapter_config.json has base_model_name_or_path={name}; name the base model with --base")
    base = options.base or find_base(str(name), checkpoint)
    if not options.base and revision not in (None, "", "main") and not local_path(base):
        raise SettingsError(
            f"adapter_config.json has revision={revision}; download that one, and name its folder with --base"
        )
    state = read_object(checkpoint / "state.json") if os.path.isfile(checkpoint / "state.json") else {}
    chosen = options.quantization or state.get("quantization") or "none"
    if chosen not in ("4", "8", "none"):
        raise SettingsError(f"state.json has quantization={chosen}; set --quantization")
    trusted = options.trust_remote_code
    return ModelConfig(name=base, quantization=chosen, trust_remote_code=trusted, cache_folder=None)


def find_base(name: str, checkpoint: Path) -> str:
    """What `base_model_name_or_path` means: a folder as seen from here, else from the adapter, else a Hub id."""
    if local_path(name):
        return name
    here = checkpoint.absolute()
    return next((str(place / name) for place in (here, here.parent) if os.path.isdir(place / name)), name)


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors. Raises SettingsError if they cannot be read, or are not finite.

    A pickle is read as data only: it cannot run code.
    """
    files = [checkpoint / name for name in (adapters.ADAPTER_FILE, PICKLED_FILE)]  # in PEFT's order
    file = next(filter(os.path.exists, files), None)
    if file is None:
        raise SettingsError(f"has no {adapters.ADAPTER_FILE} (or {PICKLED_FILE}); copy the adapter again")
    with explained(f"{file.name} cannot be read", "; copy the adapter again"):
        if is_lfs_pointer(file):
            raise ValueError("it is a Git LFS pointer, not the file itself: run `git lfs pull` there")
        try:
            tensors = load_peft_weights(str(checkpoint), device="cpu")
        except pickle.UnpicklingError as error:
            raise SettingsError(
                f"{file.name} is damaged, or holds more than tensors and could run code; copy the adapter again, or "
                "save it as safetensors where you trust it"
            ) from error
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor.float()).all():
                raise ValueError(f"{name} is not finite: its training diverged")
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_own_tokenizer(checkpoint: Path, base: PreTrainedConfig) -> Any:
    """The tokenizer that lies with the adapter. Raises SettingsError if it does not load, or has no EOS."""
    advice = f"; remove {', '.join(TOKENIZER_FILES)} to use the base model's"
    with explained("the tokenizer in this folder cannot be loaded", advice):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise SettingsError("the tokenizer in this folder has no eos_token")
    tokenizer.name_or_path = base.name_or_path  # where `dataset.end_ids` finds what else ends an answer of this model
    return tokenizer


def choose_template(name: str | None, checkpoint: Path, tokenizer: Any) -> str:
    """The chat template: the one asked for, else the adapter's own, else the tokenizer's, else Alpaca's."""
    file = checkpoint / adapters.TEMPLATE_FILE
    found = str(file) if os.path.exists(file) else "tokenizer" if tokenizer.chat_template else "alpaca"
    return read_template(DatasetConfig(template=name or found), tokenizer)


# --- how it fits its base model -------------------------------------------------------------------


def is_whole(name: str, embeddings: Sequence[str]) -> bool:
    """Whether a tensor of an adapter is a whole weight of one of the `embeddings`, in or without a wrapper of PEFT."""
    inside = any(name.startswith(f"{PREFIX}{embedding}.") for embedding in embeddings)
    return inside and name.endswith((".weight", ".bias")) and "lora_" not in name


def rows_needed(
    shapes: Mapping[str, tuple[int, ...]], embeddings: Sequence[str], known: int, tokenizer: Any, is_own: bool
) -> int:
    """Rows of the embeddings that the adapter was trained with.

    Args:
        known: rows that the base model has.
        is_own: whether `tokenizer` is the adapter's own; it may have more tokens than the base model.
    """
    saved = [shape[0] for name, shape in shapes.items() if is_whole(name, embeddings) and shape]
    tokens = max(tokenizer.get_vocab().values()) + 1
    rows = max(saved, default=max(known, tokens) if is_own else known)
    if tokens > rows and (is_own or rows < known):
        raise SettingsError(
            f"its embeddings have {rows} rows, its tokenizer {tokens} tokens; copy the adapter again, with the "
            "tokenizer that it was trained with"
        )
    return rows


def saved_modules(lora: LoraConfig, shapes: Mapping[str, Any], embeddings: Sequence[str]) -> list[str] | None:
    """`modules_to_save` with embeddings that were saved without it, so that the base model's own stay beside them."""
    listed = list(lora.modules_to_save or [])
    saved = [name for name in embeddings if f"{PREFIX}{name}.weight" in shapes]
    return [*listed, *(name for name in saved if not name.endswith(tuple(listed)))] or None


def expected_shapes(empty: Any, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """What PEFT saves of an adapter with these settings in the `empty` base model, which then has one.

    Raises:
        SettingsError: if it cannot make one in this model.
    """
    chosen = copy.deepcopy(lora)
    chosen.init_lora_weights = True  # others, such as PiSSA, need the weights
    with explained("adapter_config.json does not fit the base model"), torch.device("meta"):
        model = get_peft_model(empty, chosen)
        saved = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def resize(base: Any, rows: int) -> None:
    """Give the embeddings of `base` as many `rows` as the adapter needs.

    A new row is the mean of the others, until the adapter brings its own: no answer prefers such a token.
    (transformers' own `mean_resizing` draws noise around that mean, and takes a minute for it on a CPU.)
    """
    known = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            if layer is not None and rows > known:
                layer.weight[known:] = layer.weight[:known].float().mean(0).to(layer.weight.dtype)
