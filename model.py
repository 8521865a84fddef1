"""Base model, quantization and LoRA adapter: everything that touches weights. Never imports Flower.

An *adapter* here is a dict from PEFT's parameter names (as in adapter_model.safetensors) to float32 arrays, sorted by
name. The server makes, checks and saves adapters from shapes alone, and only clients load a base model.
"""

import copy
import hashlib
import json
import logging
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

# it wraps functions that are not used here with torch.compile, whose import takes seconds in every process
with patch.object(torch, "compile", lambda function=None, **_: function or (lambda decorated: decorated)):
    import bitsandbytes

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from hub import models as hub
from settings.lora import check_lora
from settings.schema import ClientResources, ModelConfig, SettingsError, check_keywords
from utils import let_others_read, local_path, shipped_path, shortened, torn_files, write_digests

log = logging.getLogger(__name__)

Adapter = dict[str, np.ndarray]

ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", hub.ADAPTER_CONFIG
TEMPLATE_FILE = "chat_template.jinja"
MANAGED_LORA = {
    "task_type": "it is CAUSAL_LM",
    "base_model_name_or_path": "set model.name",
    "inference_mode": "the adapter is trained here",
    "peft_type": "it is LORA",
    "revision": "download that one, and set model.name to its folder",
}
LINEAR = (torch.nn.Linear, Conv1D)  # what LoRA goes into, besides embeddings; GPT-2 has the latter
ATTENTION = (["q_proj", "v_proj"], ["qkv_proj"], ["query_key_value"], ["Wqkv"], ["c_attn"])  # for kinds new to PEFT
NAMING = ("modules_to_save", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern", "target_modules")
PROBE = "Below is a question. Answer it in a few words: how much is 12 plus 30, and why?"
RANDOM, ZERO = ("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")  # tensors by how they begin


# --- configuration and tokenizer --------------------------------------------------------------------


def read_config(cfg: ModelConfig, *, offline: bool = False) -> PreTrainedConfig:
    """The base model's shapes, without its weights; if `offline`, what is on this machine has to do.

    Raises SettingsError if `model.name` is no base model that can be loaded, or `model.quantization` does not fit, and
    RunError if the Hub cannot be reached.
    """
    folder = hub.cached_model(cfg.name, code=cfg.trust_remote_code) if offline else base_folder(cfg)
    if folder is None:
        raise SettingsError(f"model.name={cfg.name}: not on this machine")
    base = described(cfg, folder)
    if (bits := stored_bits(cfg.name, base)) and bits != cfg.quantization:
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
    with loading(cfg, "its config.json"):
        base = AutoConfig.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
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


@contextmanager
def loading(cfg: ModelConfig, part: str, advice: str = "") -> Iterator[None]:
    """Answer whatever transformers makes of a part of a repository, which may hold anything, with one line."""
    try:
        yield
    except Exception as error:
        if part == "its weights" and isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | MemoryError):
            raise
        kind = f"{type(error).__name__}: " if isinstance(error, KeyError | AttributeError | IndexError) else ""
        why = f"{part} cannot be loaded ({shortened(f'{kind}{error}' or repr(error), 300)})"
        if "trust_remote_code" in str(error):
            why = "brings Python code of its own; if you trust it, set model.trust_remote_code=true"
        raise SettingsError(f"model.name={cfg.name}: {why}{advice}") from error


def first_sentence(error: BaseException) -> str:
    return shortened(" ".join(str(error).split()).split(". ")[0], 300)


def stored_bits(name: str, base: PreTrainedConfig) -> str | None:
    """In how many bits bitsandbytes stored a base model, "4" or "8"; None if it is not quantized."""
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
    """The base model's tokenizer; `offline` as for `read_config`.

    Raises SettingsError if it does not load, has no end-of-sequence token, or is not the tokenizer of this model.
    """
    base = read_config(cfg, offline=offline)
    with loading(cfg, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base.name_or_path, trust_remote_code=cfg.trust_remote_code)
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

    With the base `model`, with or without weights, target modules are its own, in its language part alone; null means
    PEFT's choice for this kind of model, or the attention projections that it has. Raises SettingsError for unknown or
    impossible fields, for modules that `model` lacks, and for initialisations that change the base model (PiSSA,
    OLoRA, ...), which is shared and must stay as it is.
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
    modules, linear, others = language_part(model)
    if lora.target_modules is None:
        listed = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.get_text_config().model_type)
        known = (set(names) for names in (listed, *ATTENTION) if isinstance(names, list))
        lora.target_modules = next((names for names in known if names <= linear), "all-linear")
    check_named_modules(lora, model, modules, linear)
    if cfg.quantization != "none":
        check_saved_modules(lora, model)
    if others:
        lora.exclude_modules = "|".join([others, *patterns(lora.exclude_modules).values()])
    return lora


def language_part(model: Any) -> tuple[list[str], set[str], str | None]:
    """What of `model` adapters may go into: its decoder and head, without the towers of one that also sees or hears.

    Returns:
        Names of its modules, last parts of the names of its linear layers, and a pattern for the modules that are not
        in it; None if it is the whole model, as of one that has no other linear layers.
    """
    names = {module: name for name, module in model.named_modules()}
    head, decoder = names.get(model.get_output_embeddings(), ""), names.get(model.get_decoder(), "")
    linear = [name for module, name in names.items() if isinstance(module, LINEAR)]
    inside = [name for name in linear if name == head or name.startswith(f"{decoder}." if decoder else "")]
    others = None if inside == linear else rf"(?!{re.escape(decoder)}\.|{re.escape(head)}$).*"
    modules = [name for name in names.values() if not (others and re.fullmatch(others, name))]
    return modules, {name.rpartition(".")[2] for name in inside}, others


def patterns(names: Any) -> dict[str, str]:
    """Each name with the regular expression that a module's whole name has to match, in PEFT's three ways to name them:
    a regular expression, names, or a mapping of the ends of regular expressions."""
    if isinstance(names, str):
        return {names: names}
    is_pattern = isinstance(names, Mapping)
    return {name: rf"(.*\.)?({name if is_pattern else re.escape(name)})" for name in sorted(names or [])}


def check_named_modules(lora: LoraConfig, model: Any, modules: Sequence[str], linear: set[str]) -> None:
    """Raise SettingsError if one of NAMING in `lora` names what the language part of `model` lacks."""
    leaves = {name.rpartition(".")[2] for name in modules}
    known = {leaf for leaf in leaves if leaf and not leaf.isdigit()}
    parameters = [name for name, _ in model.named_parameters()]
    for key in NAMING:
        names = getattr(lora, key)
        what, there = ("parameter", parameters) if key == "target_parameters" else ("module", modules)
        if names == "all-linear" or (key == "exclude_modules" and isinstance(names, str)):
            continue
        for name, pattern in patterns(names).items():
            where = f"model.lora.{key}={name}"
            try:
                matches = re.compile(pattern).fullmatch
            except re.error as error:
                raise SettingsError(f"{where}: not a valid regular expression ({error}); use names") from error
            if not any(map(matches, there)):
                names_there = ", ".join(sorted(linear if key == "target_modules" else known))
                raise SettingsError(
                    f"{where}: the language part of this model has no such {what}; it has {names_there}"
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
    """The base model on the meta device: shapes and names for no memory. Raises SettingsError if it cannot be built."""
    with loading(cfg, "its architecture"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(base, trust_remote_code=cfg.trust_remote_code)


def adapter_plan(cfg: ModelConfig, base: PreTrainedConfig) -> tuple[LoraConfig, dict[str, tuple[int, ...]]]:
    """The adapter that `model.lora` means for this base model: configuration, and names and shapes of its tensors."""
    empty = empty_model(base, cfg)
    lora = lora_config(cfg, empty)
    return lora, adapter_shapes(empty, lora)


def adapter_shapes(empty: Any, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an adapter in an `empty_model`, which then has that adapter."""
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
    text = json.dumps(lora.to_dict() | {"inference_mode": True}, indent=2, sort_keys=True, default=sorted)
    (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def load_adapter(folder: Path) -> Adapter:
    """The adapter that `save_adapter` (or PEFT) wrote into `folder`."""
    return dict(sorted(load_file(folder / ADAPTER_FILE).items()))


# --- the base model ---------------------------------------------------------------------------------


def load_base(cfg: ModelConfig, device: str | None = None) -> Any:
    """The frozen base model: nf4 with double quantization, 8-bit, or unquantized weights; computes in `compute_dtype`.

    The `device`, `cuda` or `cpu`, is by default CUDA where there is one. Raises as `load_weights`.
    """
    device = device or default_device()
    is_kept = cfg.cache_folder and cfg.quantization != "none"
    base = load_cached(cfg, device) if is_kept else load_weights(cfg, compute_dtype(device), device)
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = compute_dtype(device)  # of a model that is stored in 4 bits it may be another
            # On a CPU with AVX512-BF16 an evaluation would repack 4-bit weights in place; the gradients of all
            # later training steps would then be wrong, without a word, and widths off a multiple of 64 crash.
            module.support_avx512bf16_for_cpu = False
    return base.requires_grad_(False)


def load_weights(cfg: ModelConfig, dtype: torch.dtype | str, device: str) -> Any:
    """The base model with its weights, quantized if `model.quantization` says so and they are not stored like that."""
    folder, options = base_folder(cfg, weights=True), {}
    if cfg.quantization != "none" and not stored_bits(cfg.name, read_config(cfg)):
        options["quantization_config"] = quantized_in(cfg.quantization, dtype)
    again = "copy it again" if local_path(cfg.name) else f"download it again: hf download --force-download {cfg.name}"
    with loading(cfg, "its weights", f"; if a file is damaged, {again}"):
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are named below
        base, found = from_folder(folder, cfg, dtype, device, **options)
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


def from_folder(folder: Path, cfg: ModelConfig, dtype: torch.dtype | str, device: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, trust_remote_code=cfg.trust_remote_code, **options
    )


def quantized_in(bits: str, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """How weights are quantized in "4" or "8" bits: nf4 with double quantization, which computes in `dtype`."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return transformers.BitsAndBytesConfig(load_in_4bit=bits == "4", load_in_8bit=bits == "8", **nf4)


def load_cached(cfg: ModelConfig, device: str) -> Any:
    """The quantized base model from `model.cache_folder`; quantized now and put there, if it is not there whole.

    The entry's name is made of everything that decides its content; each of its files has to have the SHA-256 that
    was noted when it was written. Processes may do this at the same time: the first whole entry stays.
    """
    entry = Path(str(cfg.cache_folder)).expanduser() / cache_key(cfg, device)
    if entry.is_dir() and not torn_files(entry):
        return from_folder(entry, cfg, compute_dtype(device), device)
    base = load_weights(cfg, compute_dtype(device), device)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{entry.name}.", dir=entry.parent) as beside:
            whole = Path(beside) / "whole"
            base.save_pretrained(whole)
            write_digests(whole)
            if entry.is_dir() and (torn := torn_files(entry)):
                log.warning("%s: %s changed since it was written; rebuilt", entry, ", ".join(torn))
                entry.rename(Path(beside) / "old")
            with suppress(OSError):  # another process was first
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
    """What a base model computes in: bfloat16, or float32 on a CPU that would emulate bfloat16."""
    native = (device or default_device()) == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def arithmetic(model: Any) -> AbstractContextManager[Any]:
    """What `model` computes in, wherever it is used: a float32 adapter's products are bfloat16 if its base model is."""
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
