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
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

# it wraps functions that are not used here with torch.compile, whose import takes seconds in every process
with patch.object(torch, "compile", lambda function=None, **_: function or (lambda decorated: decorated)):
    import bitsandbytes

import transformers
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hub import models as hub
from settings.lora import check_lora
from settings.schema import ClientResources, ModelConfig, SettingsError, check_keywords
from utils import let_others_read, local_path, shipped_path, shortened, torn_files, write_digests

log = logging.getLogger(__name__)

Adapter = dict[str, np.ndarray]

ADAPTER_FILE, ADAPTER_CONFIG_FILE, TEMPLATE_FILE = (
    "adapter_model.safetensors",
    hub.ADAPTER_CONFIG,
    "chat_template.jinja",
)
MANAGED_LORA = {
    "task_type": "it is CAUSAL_LM",
    "base_model_name_or_path": "set model.name",
    "inference_mode": "the adapter is trained here",
    "peft_type": "it is LORA",
    "revision": "download that one, and set model.name to its folder",
}
LINEAR = (torch.nn.Linear, Conv1D)  # what LoRA goes into, besides embeddings; GPT-2 has the latter
ATTENTION = (["q_proj", "v_proj"], ["qkv_proj"], ["query_key_value"], ["Wqkv"], ["c_attn"])
"""Attention projections by the names that models give them, for kinds that PEFT's own table lacks."""
NAMING = (  # settings of LoRA that name modules or parameters
    "modules_to_save", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern", "target_modules"
)  # fmt: skip
PROBE = "Below is a question. Answer it in a few words: how much is 12 plus 30, and why?"
RANDOM, ZERO = ("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")  # tensors by how they begin


# --- configuration and tokenizer --------------------------------------------------------------------


def read_config(cfg: ModelConfig, *, offline: bool = False) -> PreTrainedConfig:
    """The base model's shapes, without its weights.

    Args:
        offline: ask nobody: what is on this machine has to do.

    Raises:
        SettingsError: if `model.name` is no base model that can be loaded, or `model.quantization` does not fit.
        RunError: if the Hub cannot be reached.
    """
    folder = hub.cached_model(cfg.name, code=cfg.trust_remote_code) if offline else base_folder(cfg)
    if folder is None:
        raise SettingsError(f"model.name={cfg.name}: not on this machine")
    base = described(cfg, folder)
    bits = stored_bits(cfg.name, base)
    if bits and bits != cfg.quantization:
        raise SettingsError(
            f"model.quantization={cfg.quantization}: {cfg.name} is stored in {bits} bits; set "
            f"model.quantization={bits}, or name the unquantized model"
        )
    return base


def described(cfg: ModelConfig, folder: Path) -> PreTrainedConfig:
    """The config.json in the base model's folder. Raises SettingsError if it is not a causal language model's."""
    if (folder / hub.ADAPTER_CONFIG).is_file():
        raise SettingsError(
            f"model.name={cfg.name}: an adapter lies beside the model, and transformers would put it in; move "
            f"{hub.ADAPTER_CONFIG} out of {folder}"
        )
    try:
        base = AutoConfig.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
    except Exception as error:  # a repository's file may hold anything
        raise SettingsError(f"model.name={cfg.name}: {unloadable('its config.json', error)}") from error
    own_code = getattr(base, "auto_map", None) or {}
    if base.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in own_code:
        raise SettingsError(
            f"model.name={cfg.name}: transformers has no causal language model of the kind {base.model_type}; name a "
            "text model, or one with image input that AutoModelForCausalLM loads, such as Gemma 3"
        )
    return base


def base_folder(cfg: ModelConfig, *, weights: bool = False) -> Path:
    """The local folder of the base model, downloaded if it has to be. Raises as `hub.model_folder`."""
    return hub.model_folder(cfg.name, weights=weights, code=cfg.trust_remote_code)


def unloadable(what: str, error: BaseException) -> str:
    """Why a part of a repository does not load, for people."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "brings Python code of its own; if you trust it, set model.trust_remote_code=true"
    text = f"{type(error).__name__}: {text}" if isinstance(error, KeyError | AttributeError | IndexError) else text
    return f"{what} cannot be loaded ({shortened(text or repr(error), 300)})"


def first_sentence(error: BaseException) -> str:
    return shortened(" ".join(str(error).split()).split(". ")[0], 300)


def stored_bits(name: str, base: PreTrainedConfig) -> str | None:
    """In how many bits a base model is stored, "4" or "8"; None if it is not quantized.

    Raises:
        SettingsError: if it is quantized by anything but bitsandbytes.
    """
    stored: Any = getattr(base, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    bits = "4" if stored.get("load_in_4bit") else "8" if stored.get("load_in_8bit") else None
    if stored and not bits:
        method = getattr(stored.get("quant_method"), "value", stored.get("quant_method"))
        raise SettingsError(
            f"model.name={name}: is stored quantized ({method}); only models that are not, or by bitsandbytes in 4 or "
            "8 bits, can be trained here: name the unquantized model"
        )
    return bits


def read_tokenizer(cfg: ModelConfig, *, offline: bool = False) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Args:
        offline: as for `read_config`.

    Raises:
        SettingsError: if it does not load, has no end-of-sequence token, or is not the tokenizer of this model.
    """
    base = read_config(cfg, offline=offline)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.name_or_path, trust_remote_code=cfg.trust_remote_code)
    except Exception as error:  # a repository's files may hold anything
        raise SettingsError(f"model.name={cfg.name}: {unloadable('its tokenizer', error)}") from error
    if tokenizer.eos_token_id is None:
        raise SettingsError(f"model.name={cfg.name}: its tokenizer has no eos_token, so no answer could ever end")
    check_tokenizer(cfg.name, tokenizer, base.get_text_config().vocab_size)
    return tokenizer


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Raise SettingsError if a tokenizer knows too little of its model's `vocabulary` to be its own."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if 2 * len(tokenizer) < vocabulary or not ids or 4 * unknown > len(ids):
        raise SettingsError(
            f"model.name={name}: its tokenizer knows {len(tokenizer)} tokens, the model {vocabulary}, and plain "
            f"English becomes {unknown} unknown tokens of {len(ids)}; its files are missing or not this model's "
            "(tokenizer.json or tokenizer.model)"
        )
    words = tokenizer.get_vocab()
    own = [words[token] for token in words.keys() - tokenizer.get_added_vocab().keys()]  # added ones may be unused
    if (most := max([*ids, *own, tokenizer.eos_token_id or 0])) >= vocabulary:
        raise SettingsError(
            f"model.name={name}: its tokenizer makes token {most}, the model has {vocabulary}; it is another's"
        )


# --- an adapter, without its base model -------------------------------------------------------------


def lora_config(cfg: ModelConfig, model: Any = None) -> LoraConfig:
    """`model.lora` as a `peft.LoraConfig` for causal language modelling.

    Args:
        model: the base model, with or without weights. Target modules are then its own, in its language part alone;
            null means PEFT's choice for this kind of model, or the attention projections that it has.

    Raises:
        SettingsError: for unknown or impossible fields, for modules that `model` lacks, and for initialisations that
            change the base model (PiSSA, OLoRA, ...), which is shared and must stay as it is.
    """
    check_keywords("model.lora", cfg.lora, LoraConfig, MANAGED_LORA)
    check_lora(cfg.lora)
    folder = local_path(cfg.name)  # one of this machine is noted by its whole path, so that it is found later
    name = cfg.name if folder is None or shipped_path(cfg.name) else str(folder.resolve())
    try:
        lora = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=name, **cfg.lora)
    except Exception as error:  # whatever PEFT makes of values that contradict each other
        raise SettingsError(f"model.lora: {first_sentence(error)}") from error
    if model is None:
        return lora
    part = language_part(model)
    if lora.target_modules is None:
        listed = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.get_text_config().model_type)
        known = (set(names) for names in (listed, *ATTENTION) if isinstance(names, list))
        lora.target_modules = next((names for names in known if names <= part.linear), "all-linear")
    check_named_modules(lora, model, part)
    if cfg.quantization != "none":
        check_saved_modules(lora, model)
    if part.others:
        lora.exclude_modules = "|".join([part.others, *patterns(lora.exclude_modules).values()])
    return lora


class LanguagePart(NamedTuple):
    """What of a model adapters may go into: a model that also sees or hears has towers beside its decoder."""

    modules: list[str]
    """Names of all its modules."""
    linear: set[str]
    """Last parts of the names of its linear layers."""
    others: str | None
    """A pattern for the modules that are not in it; None if it is the whole model."""


def language_part(model: Any) -> LanguagePart:
    """The decoder of `model` and its head, found in one walk; the whole of a model that has no other linear layers."""
    names = {module: name for name, module in model.named_modules()}
    head, decoder = names.get(model.get_output_embeddings(), ""), names.get(model.get_decoder(), "")
    linear = [name for module, name in names.items() if isinstance(module, LINEAR)]
    inside = [name for name in linear if name == head or name.startswith(f"{decoder}." if decoder else "")]
    others = None if inside == linear else rf"(?!{re.escape(decoder)}\.|{re.escape(head)}$).*"
    modules = [name for name in names.values() if not (others and re.fullmatch(others, name))]
    return LanguagePart(modules, {name.rpartition(".")[2] for name in inside}, others)


def patterns(names: Any) -> dict[str, str]:
    """PEFT's three ways to name modules: a regular expression, names, or a mapping of the ends of regular expressions.

    Each name comes with the regular expression that the whole name of a module has to match.
    """
    if isinstance(names, str):
        return {names: names}
    is_pattern = isinstance(names, Mapping)
    return {name: rf"(.*\.)?({name if is_pattern else re.escape(name)})" for name in sorted(names or [])}


def check_named_modules(lora: LoraConfig, model: Any, part: LanguagePart) -> None:
    """Raise SettingsError if `lora` names what the language part of `model` lacks."""
    leaves = {name.rpartition(".")[2] for name in part.modules}
    known = {leaf for leaf in leaves if leaf and not leaf.isdigit()}
    parameters = [name for name, _ in model.named_parameters()]
    for key in NAMING:
        names = getattr(lora, key)
        what, there = ("parameter", parameters) if key == "target_parameters" else ("module", part.modules)
        if names == "all-linear" or (key == "exclude_modules" and isinstance(names, str)):
            continue
        for name, pattern in patterns(names).items():
            try:
                matches = re.compile(pattern).fullmatch
            except re.error as error:
                raise SettingsError(
                    f"model.lora.{key}={name}: not a valid regular expression ({error}); use names"
                ) from error
            if not any(map(matches, there)):
                raise SettingsError(
                    f"model.lora.{key}={name}: the language part of this model has no such {what}; it has "
                    f"{', '.join(sorted(part.linear if key == 'target_modules' else known))}"
                )


def check_saved_modules(lora: LoraConfig, model: Any) -> None:
    """Raise SettingsError if `modules_to_save` names a layer that is quantized, which cannot be trained whole."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        saved = next((saved for saved in lora.modules_to_save or [] if f".{name}".endswith(f".{saved}")), None)
        if saved and any(isinstance(layer, LINEAR) and layer is not head for layer in module.modules()):
            raise SettingsError(
                f"model.lora.modules_to_save={saved}: {name} is quantized, and only layers that are not can be trained "
                "whole; name it in model.lora.target_modules, or set model.quantization=none"
            )


def empty_model(base: PreTrainedConfig, cfg: ModelConfig) -> Any:
    """The base model without weights, on the meta device: shapes and names for no memory.

    Raises:
        SettingsError: if transformers, or the code of its repository, cannot build it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(base, trust_remote_code=cfg.trust_remote_code)
    except Exception as error:  # a repository's configuration and code may hold anything
        raise SettingsError(f"model.name={cfg.name}: {unloadable('its architecture', error)}") from error


def adapter_plan(cfg: ModelConfig, base: PreTrainedConfig) -> tuple[LoraConfig, dict[str, tuple[int, ...]]]:
    """The adapter that `model.lora` means for this base model: its configuration, and names and shapes of its tensors.

    Raises:
        SettingsError: if there is no such adapter.
    """
    empty = empty_model(base, cfg)
    lora = lora_config(cfg, empty)
    return lora, adapter_shapes(empty, lora)


def adapter_shapes(empty: Any, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an adapter in an `empty_model`, which then has that adapter.

    Raises:
        SettingsError: if PEFT cannot make such an adapter in this model.
    """
    with torch.device("meta"):
        try:
            empty = get_peft_model(empty, copy.deepcopy(lora))  # peft renames the base model in what it is given
        except Exception as error:  # whatever PEFT makes of values that do not fit this model
            raise SettingsError(f"model.lora: {type(error).__name__}: {first_sentence(error)}") from error
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
        if any(part in name for part in RANDOM):
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            gaussian = lora.init_lora_weights == "gaussian"
            drawn = generator.normal(0, 1 / lora.r, shape) if gaussian else generator.uniform(-bound, bound, shape)
            adapter[name] = drawn.astype(np.float32)
        elif any(part in name for part in ZERO):
            adapter[name] = np.zeros(shape, np.float32)
    return adapter


def starts_from_base(shapes: Iterable[str]) -> bool:
    """Whether an adapter has tensors that `initial_adapter` cannot make."""
    return not all(any(drawn in name for drawn in (*RANDOM, *ZERO)) for name in shapes)


def trainable_state(model: PeftModel) -> dict[str, torch.Tensor]:
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return get_peft_model_state_dict(model, state_dict=trainable, save_embedding_layers=False)  # else it asks the Hub


def save_adapter(folder: Path, adapter: Adapter, lora: LoraConfig, template: str) -> None:
    """Write `adapter` in PEFT's format, with the chat template that it was trained with."""
    folder.mkdir(parents=True)
    save_file(adapter, folder / ADAPTER_FILE, metadata={"format": "pt"})
    let_others_read(folder / ADAPTER_FILE)
    saved = lora.to_dict() | {"inference_mode": True}
    text = json.dumps(saved, indent=2, sort_keys=True, default=sorted)
    (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def load_adapter(folder: Path) -> Adapter:
    """The adapter that `save_adapter` (or PEFT) wrote into `folder`."""
    return dict(sorted(load_file(folder / ADAPTER_FILE).items()))


# --- the base model ---------------------------------------------------------------------------------


def load_base(cfg: ModelConfig, device: str | None = None) -> Any:
    """The frozen base model: nf4 with double quantization, 8-bit, or unquantized weights; computes in `compute_dtype`.

    Args:
        device: `cuda` or `cpu`; by default CUDA where there is one.

    Raises:
        SettingsError: if its weights are missing, damaged or another model's.
    """
    device = device or default_device()
    is_kept = cfg.cache_folder and cfg.quantization != "none"
    base = load_cached(cfg, device) if is_kept else load_weights(cfg, compute_dtype(device), device)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = compute_dtype(device)  # of a model that is stored in 4 bits it may be another
            # On a CPU with AVX512-BF16 an evaluation would repack 4-bit weights in place; the gradients of all
            # later training steps would then be wrong, without a word, and widths off a multiple of 64 crash.
            module.support_avx512bf16_for_cpu = False
    return base.requires_grad_(False)


def load_weights(cfg: ModelConfig, dtype: torch.dtype | str, device: str) -> Any:
    """The base model with its weights, quantized if `model.quantization` says so and they are not stored like that.

    Raises:
        SettingsError: if some are missing, damaged or of other shapes.
    """
    folder, options = base_folder(cfg, weights=True), {}
    if cfg.quantization != "none" and not stored_bits(cfg.name, read_config(cfg)):
        options["quantization_config"] = quantized_in(cfg.quantization, dtype)
    try:
        base, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=cfg.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **options,
        )
    except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise
    except Exception as error:  # a file of weights may hold anything
        again = f"download it again: hf download --force-download {cfg.name}"
        raise SettingsError(
            f"model.name={cfg.name}: {unloadable('its weights', error)}; if a file is damaged, "
            f"{'copy it again' if local_path(cfg.name) else again}"
        ) from error
    for tensor, stored, expected in sorted(found["mismatched_keys"]):
        raise SettingsError(
            f"model.name={cfg.name}: its weights are of another model than its config.json describes: {tensor} is "
            f"{tuple(stored)}, not {tuple(expected)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise SettingsError(
            f"model.name={cfg.name}: its weights lack {len(missing)} tensors, such as {missing[0]}; they are not of "
            "the model that its config.json describes"
        )
    return base


def quantized_in(bits: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How weights are quantized in "4" or "8" bits: nf4 with double quantization, which computes in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=bits == "4",
        load_in_8bit=bits == "8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_cached(cfg: ModelConfig, device: str) -> Any:
    """The quantized base model from `model.cache_folder`; quantized now and put there, if it is not there whole.

    The entry's name is made of everything that decides its content; each of its files has to have the SHA-256 that
    was noted when it was written. Processes may do this at the same time: the first whole entry stays.
    """
    entry = Path(str(cfg.cache_folder)).expanduser() / cache_key(cfg, device)
    if entry.is_dir() and not torn_files(entry):
        return AutoModelForCausalLM.from_pretrained(
            entry,
            dtype=compute_dtype(device),
            device_map={"": device},
            trust_remote_code=cfg.trust_remote_code,
        )
    base = load_weights(cfg, compute_dtype(device), device)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{entry.name}.", dir=entry.parent) as beside:
            whole, old = Path(beside) / "whole", Path(beside) / "old"
            base.save_pretrained(whole)
            write_digests(whole)
            if entry.is_dir() and (torn := torn_files(entry)):
                log.warning("%s: %s changed since it was written; rebuilt", entry, ", ".join(torn))
                entry.rename(old)
            with contextlib.suppress(OSError):  # another process was first
                whole.rename(entry)
    except Exception as error:  # a full disk, a folder that cannot be written: the model is here all the same
        log.warning("model.cache_folder=%s: the quantized model is not kept (%s)", cfg.cache_folder, error)
    return base


def cache_key(cfg: ModelConfig, device: str | None = None) -> str:
    """A name for a quantized model: which weights, how quantized, by which library, and how the rest is kept."""
    folder = base_folder(cfg, weights=True)
    weights: list[Any] = [cfg.name, folder.name]  # the Hub's folders are named by their commits
    if local_path(cfg.name):  # these can change in place
        weights = sorted([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in folder.iterdir())
        weights.append(str(folder))
    facts = [weights, cfg.quantization, str(compute_dtype(device)), bitsandbytes.__version__, transformers.__version__]
    return f"{Path(cfg.name).name}-{cfg.quantization}bit-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def default_device() -> str:
    """Where this process computes, if no run says it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(resources: ClientResources) -> str:
    """Where a run's clients train in this process: `client_resources.num_gpus` decides, where there is a GPU at all."""
    return default_device() if resources.num_gpus else "cpu"


def compute_dtype(device: str | None = None) -> torch.dtype:
    """What a base model computes in: bfloat16, or float32 on a CPU without bfloat16 instructions, which are emulated.

    Args:
        device: as for `load_base`.
    """
    native = (device or default_device()) == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def arithmetic(model: Any) -> contextlib.AbstractContextManager[Any]:
    """What `model` computes in, wherever it is used: with a base model in bfloat16, so do an adapter's products.

    The adapter's weights stay float32. Training, evaluation and answers all use this, and so agree.
    """
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)


def check_device(use_dora: bool, quantization: str, device: str) -> None:
    """Raise SettingsError for DoRA in 8 bits on a CPU: PEFT's second pass fails there, after it moved the weights."""
    if use_dora and quantization == "8" and device == "cpu":
        raise SettingsError(
            "model.quantization=8: with model.lora.use_dora=true it needs a GPU; use model.quantization=4 or none"
        )


# --- an adapter in its base model -------------------------------------------------------------------


def add_adapter(base: Any, cfg: ModelConfig) -> PeftModel:
    """`base` with a new, trainable float32 adapter; the base weights stay as they are, in place."""
    lora = lora_config(cfg, base)
    check_device(lora.use_dora, cfg.quantization, next(base.parameters()).device.type)
    model = get_peft_model(base, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return fit_saved_modules(model)


def fit_saved_modules(model: PeftModel) -> PeftModel:
    """Let whole modules that an adapter trains (`modules_to_save`), which are float32, work among others."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            kind = next(module.original_module.parameters()).dtype
            for trained in module.modules_to_save.values():
                trained.register_forward_pre_hook(cast_inputs)
                trained.register_forward_hook(lambda _, __, output, kind=kind: output.to(kind))
    return model


def cast_inputs(trained: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    kind = next(trained.parameters()).dtype
    return tuple(value.to(kind) if torch.is_floating_point(value) else value for value in inputs)


def get_adapter(model: PeftModel) -> Adapter:
    """A copy of the adapter inside `model`."""
    state = trainable_state(model)
    return {name: state[name].detach().float().cpu().numpy().copy() for name in sorted(state)}


def set_adapter(model: PeftModel, adapter: Mapping[str, np.ndarray]) -> None:
    """Put `adapter` into `model`; tensors that `adapter` lacks keep their values."""
    set_peft_model_state_dict(model, {name: torch.from_numpy(np.array(value)) for name, value in adapter.items()})
