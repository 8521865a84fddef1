"""Base model, quantization and LoRA adapter: everything that touches weights. Never imports Flower.

An *adapter* here is a dict from PEFT's parameter names (as in adapter_model.safetensors) to float32
arrays, sorted by name. It exists on its own: the server makes, checks and saves adapters from shapes
alone, and only clients load a base model.
"""

import contextlib
import copy
import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from config import ModelConfig, SettingsError, check_keywords
from utils import local_path, torn_files, write_digests

log = logging.getLogger(__name__)

Adapter = dict[str, np.ndarray]

ADAPTER_FILE, ADAPTER_CONFIG_FILE, TEMPLATE_FILE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "chat_template.jinja",
)
MANAGED_LORA = {
    "task_type": "it is CAUSAL_LM",
    "base_model_name_or_path": "set model.name",
    "inference_mode": "the adapter is trained here",
}
DEFAULT_INIT: dict[str, list[Any]] = {"init_lora_weights": [True, "gaussian"], "use_dora": [False, True]}


def source_of(name: str) -> str:
    """What transformers should load for `model.name`: a local folder's path if there is one, else the Hub id."""
    folder = local_path(name)
    return str(folder) if folder else name


def read_config(cfg: ModelConfig, *, offline: bool = False) -> PreTrainedConfig:
    """The base model's shapes, without its weights.

    Raises:
        SettingsError: if `model.name` is neither a model folder nor reachable on (or cached from) the Hub.
    """
    try:
        return AutoConfig.from_pretrained(
            source_of(cfg.name), trust_remote_code=cfg.trust_remote_code, local_files_only=offline
        )
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"model.name={cfg.name}: not a local model folder, and not to be had from the Hub "
            f"({first_sentence(error)}); check the name, the network and `hf auth login`"
        ) from error


def first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0][:200]


def read_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises SettingsError if it is missing or has no end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source_of(cfg.name), trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"model.name={cfg.name}: its tokenizer does not load ({first_sentence(error)})") from error
    if tokenizer.eos_token is None:
        raise SettingsError(f"model.name={cfg.name}: its tokenizer has no eos_token, so no answer could ever end")
    return tokenizer


def lora_config(cfg: ModelConfig) -> LoraConfig:
    """`model.lora` as a `peft.LoraConfig` for causal language modelling.

    Raises:
        SettingsError: for unknown or impossible fields, and for initialisations that change the base model
            (PiSSA, OLoRA, ...), which is shared and must stay as it is.
    """
    check_keywords("model.lora", cfg.lora, LoraConfig, MANAGED_LORA)
    for key, allowed in DEFAULT_INIT.items():
        if key in cfg.lora and cfg.lora[key] not in allowed:
            raise SettingsError(f"model.lora.{key}={cfg.lora[key]}: use one of {', '.join(map(str, allowed))}")
    for key in ("r", "lora_alpha"):
        if key in cfg.lora and (type(cfg.lora[key]) is not int or cfg.lora[key] < 1):
            raise SettingsError(f"model.lora.{key}={cfg.lora[key]}: use a whole number of at least 1")
    dropout = cfg.lora.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise SettingsError(f"model.lora.lora_dropout={dropout}: use a number of at least 0 and below 1")
    try:
        return LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=cfg.name, **cfg.lora)
    except (TypeError, ValueError, AttributeError) as error:
        raise SettingsError(f"model.lora: {first_sentence(error)}") from error


def adapter_shapes(base: PreTrainedConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter, from a base model on the meta device: no weights, no memory.

    Raises:
        SettingsError: if `target_modules` names no module of this model.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(base)
        try:
            empty = get_peft_model(empty, copy.deepcopy(lora))  # peft renames the base model in what it is given
        except (TypeError, ValueError, AttributeError) as error:
            raise SettingsError(f"model.lora.target_modules={lora.target_modules}: {first_sentence(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in sorted(trainable_state(empty).items())}


def initial_adapter(shapes: Mapping[str, tuple[int, ...]], lora: LoraConfig, seed: int) -> Adapter:
    """PEFT's own initialisation without a base model: A random, B zero, so that the first adapter changes nothing.

    A is uniform in +-1/sqrt(fan_in) (Kaiming with a=sqrt(5)), or normal with deviation 1/r for
    `init_lora_weights=gaussian`. Each tensor has a generator of its own, seeded from (seed, its position).
    Other tensors (DoRA's magnitudes) need the base weights and are left out: clients set them.
    """
    adapter: Adapter = {}
    for position, (name, shape) in enumerate(sorted(shapes.items())):
        generator = np.random.default_rng([seed, position])
        if "lora_A" in name or "lora_embedding_B" in name:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            gaussian = lora.init_lora_weights == "gaussian"
            drawn = generator.normal(0, 1 / lora.r, shape) if gaussian else generator.uniform(-bound, bound, shape)
            adapter[name] = drawn.astype(np.float32)
        elif "lora_B" in name or "lora_embedding_A" in name:
            adapter[name] = np.zeros(shape, np.float32)
    return adapter


def starts_from_base(shapes: Iterable[str]) -> bool:
    """Whether an adapter has tensors that `initial_adapter` can not make."""
    return any("lora_magnitude" in name for name in shapes)


def load_base(cfg: ModelConfig, device: str | None = None) -> Any:
    """The frozen base model: nf4 with double quantization, 8-bit, or bfloat16 weights; computes in bfloat16.

    Args:
        device: `cuda` or `cpu`; by default CUDA where there is one.
    """
    base = load_cached(cfg, device) if cfg.cache_folder and cfg.quantization != "none" else load_fresh(cfg, device)
    for module in base.modules():
        # On a CPU with AVX512-BF16 an evaluation would repack 4-bit weights in place; the gradients of all
        # later training steps would then be wrong, without a word, and widths off a multiple of 64 crash.
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return base.requires_grad_(False)


def load_fresh(cfg: ModelConfig, device: str | None) -> Any:
    quantization = {
        "4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        "8": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }[cfg.quantization]
    return AutoModelForCausalLM.from_pretrained(
        source_of(cfg.name),
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": device or default_device()},
        trust_remote_code=cfg.trust_remote_code,
    )


def load_cached(cfg: ModelConfig, device: str | None) -> Any:
    """The quantized base model from `model.cache_folder`; quantized now and put there, if it is not there whole.

    The entry's name is made of everything that decides its content; each of its files has to have the SHA-256 that
    was noted when it was written. Processes may do this at the same time: the first whole entry stays.
    """
    entry = Path(str(cfg.cache_folder)).expanduser() / cache_key(cfg)
    if entry.is_dir() and not torn_files(entry):
        return AutoModelForCausalLM.from_pretrained(
            entry,
            dtype=torch.bfloat16,
            device_map={"": device or default_device()},
            trust_remote_code=cfg.trust_remote_code,
        )
    base = load_fresh(cfg, device)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{entry.name}.", dir=entry.parent) as beside:
            whole, old = Path(beside) / "whole", Path(beside) / "old"
            base.save_pretrained(whole)
            write_digests(whole)
            if entry.is_dir() and (torn := torn_files(entry)):
                log.warning("%s: %s changed since it was written; made anew", entry, ", ".join(torn))
                entry.rename(old)
            with contextlib.suppress(OSError):  # another process was first
                whole.rename(entry)
    except Exception as error:  # a full disk, a folder that can not be written: the model is here all the same
        log.warning("model.cache_folder=%s: the quantized model is not kept (%s)", cfg.cache_folder, error)
    return base


def cache_key(cfg: ModelConfig) -> str:
    """A name for a quantized model: which weights, how quantized, by which library."""
    folder = local_path(cfg.name)
    weights: list[Any]
    if folder:  # its weights can change in place
        weights = sorted([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in folder.iterdir())
    else:
        weights = [getattr(read_config(cfg), "_commit_hash", None)]
    facts = [source_of(cfg.name), weights, cfg.quantization, bitsandbytes.__version__, transformers.__version__]
    return f"{Path(cfg.name).name}-{cfg.quantization}bit-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def add_adapter(base: Any, cfg: ModelConfig) -> PeftModel:
    """`base` with a new, trainable float32 adapter; the base weights stay as they are, in place."""
    model = get_peft_model(base, lora_config(cfg))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def trainable_state(model: PeftModel) -> dict[str, torch.Tensor]:
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return get_peft_model_state_dict(model, state_dict=trainable)


def get_adapter(model: PeftModel) -> Adapter:
    """A copy of the adapter inside `model`."""
    state = trainable_state(model)
    return {name: state[name].detach().float().cpu().numpy().copy() for name in sorted(state)}


def set_adapter(model: PeftModel, adapter: Mapping[str, np.ndarray]) -> None:
    """Put `adapter` into `model`; tensors that `adapter` lacks keep their values."""
    set_peft_model_state_dict(model, {name: torch.from_numpy(np.array(value)) for name, value in adapter.items()})


def save_adapter(folder: Path, adapter: Adapter, lora: LoraConfig, template: str) -> None:
    """Write `adapter` in PEFT's format, with the chat template that it was trained with."""
    folder.mkdir(parents=True)
    save_file(adapter, folder / ADAPTER_FILE, metadata={"format": "pt"})
    saved = lora.to_dict() | {"inference_mode": True}
    text = json.dumps(saved, indent=2, sort_keys=True, default=lambda value: sorted(value))
    (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def load_adapter(folder: Path) -> Adapter:
    """The adapter that `save_adapter` (or PEFT) wrote into `folder`."""
    return dict(sorted(load_file(folder / ADAPTER_FILE).items()))
