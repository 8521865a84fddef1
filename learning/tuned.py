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
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedConfig

import model as adapters
from dataset import find_template, on_one_day, own_template
from hub.models import LFS_POINTER
from settings.schema import ModelConfig, RunError, SettingsError
from utils import local_path, shortened

PREFIX = "base_model.model."  # of the names in an adapter, before the base model's own
PICKLED_FILE = "adapter_model.bin"  # as older versions of PEFT wrote it
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
OPTIONS = {  # what a setting is called here
    "model.name": "--base",
    "model.quantization": "--quantization",
    "model.trust_remote_code=true": "--trust-remote-code",
    "dataset.template": "--template",
}


def read_object(checkpoint: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the adapter's folder."""
    try:
        content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        error: Exception = ValueError(f"it holds a {type(content).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as raised:
        error = raised
    raise SettingsError(f"--peft-path={checkpoint}: {name} cannot be read ({error}); copy the adapter again") from error


def base_settings(
    checkpoint: Path, quantization: str | None, trust: bool = False, chosen_base: str | None = None
) -> ModelConfig:
    """The base model of an adapter, quantized as in training; unquantized if the adapter came from elsewhere.

    Args:
        chosen_base: the name or folder to take in place of what the adapter notes.
    """
    saved = read_object(checkpoint, adapters.ADAPTER_CONFIG_FILE)
    name, revision = saved.get("base_model_name_or_path"), saved.get("revision")
    where = f"--peft-path={checkpoint}: adapter_config.json has"
    if not chosen_base and (not isinstance(name, str) or not name):
        raise SettingsError(f"{where} base_model_name_or_path={name}; name the base model with --base")
    base = chosen_base or find_base(str(name), checkpoint)
    if not chosen_base and revision not in (None, "", "main") and not local_path(base):
        raise SettingsError(f"{where} revision={revision}; download that one, and name its folder with --base")
    state = read_object(checkpoint, "state.json") if os.path.isfile(checkpoint / "state.json") else {}
    chosen = quantization or state.get("quantization") or "none"
    if chosen not in ("4", "8", "none"):
        raise SettingsError(f"--peft-path={checkpoint}: state.json has quantization={chosen}; set --quantization")
    return ModelConfig(name=base, quantization=chosen, trust_remote_code=trust, cache_folder=None)


def find_base(name: str, checkpoint: Path) -> str:
    """What `base_model_name_or_path` means: a folder as seen from here, else from the adapter, else a Hub id."""
    if local_path(name):
        return name
    here = checkpoint.absolute()
    return next((str(place / name) for place in (here, here.parent) if os.path.isdir(place / name)), name)


def read_lora(checkpoint: Path) -> LoraConfig:
    """The adapter's settings. Raises SettingsError for other methods than LoRA, and for what this PEFT cannot do."""
    saved = read_object(checkpoint, adapters.ADAPTER_CONFIG_FILE)
    where = f"--peft-path={checkpoint}: adapter_config.json has"
    for key, allowed in (("peft_type", ["LORA"]), ("task_type", ["CAUSAL_LM", None])):
        if saved.get(key) not in allowed:
            raise SettingsError(
                f"{where} {key}={saved.get(key)}; only {allowed[0]} can be loaded: name another adapter"
            )
    known = {field.name for field in fields(LoraConfig) if field.init}
    for key in sorted(saved.keys() - known):
        if saved[key]:  # what is off has no effect
            raise SettingsError(
                f"{where} {key}={shortened(saved[key], 60)}, which PEFT {peft.__version__} does not know: another "
                "version saved it; save it with this one, or remove the field if the adapter works without"
            )
    try:
        lora = LoraConfig(**{key: value for key, value in saved.items() if key in known - {"runtime_config"}})
        names = lora.modules_to_save or []
        if not isinstance(names, list | set) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"modules_to_save={lora.modules_to_save} is no list of names")
        return lora
    except Exception as error:  # a field may hold anything
        raise SettingsError(f"{where} impossible settings ({shortened(error, 200)})") from error


@dataclass(frozen=True)
class Tuned:
    """An adapter, and the base model and tokenizer that it is for."""

    checkpoint: Path
    cfg: ModelConfig
    lora: LoraConfig
    tokenizer: Any
    rows: int | None
    """Of the embeddings, if the adapter was trained with more or fewer tokens than the base model has."""

    @property
    def base_folder(self) -> Path:
        """Where the base model lies; a folder of the Hub's cache is named by the commit."""
        return adapters.base_folder(self.cfg)

    def load(self, base: Any) -> Any:
        """The adapter in the loaded `base`, which is changed. Raises SettingsError if PEFT cannot do it."""
        try:
            if self.rows:
                resize(base, self.rows)
            model = PeftModel.from_pretrained(base, str(self.checkpoint), config=self.lora)
            return adapters.fit_saved_modules(model).eval()
        except Exception as error:  # whatever a version of PEFT makes of another's file
            raise SettingsError(
                f"--peft-path={self.checkpoint}: PEFT cannot put it into {self.cfg.name} with quantization "
                f"{self.cfg.quantization} ({shortened(error, 200)})"
            ) from error


def find_tuned(checkpoint: Path, options: argparse.Namespace, merging: bool = False) -> Tuned:
    """Read and check an adapter, its base model's shapes and its tokenizer, before any weights are loaded.

    Args:
        merging: the base model is wanted unquantized; one that is stored quantized as it is stored.
    """
    lora = read_lora(checkpoint)
    cfg = base_settings(checkpoint, options.quantization, options.trust_remote_code, options.base)
    shapes = tensor_shapes(checkpoint)
    with told_of(checkpoint):
        stored = adapters.stored_bits(cfg.name, adapters.described(cfg, adapters.base_folder(cfg)))
        if merging or (stored and not options.quantization):
            cfg.quantization = stored or "none"
        base = adapters.read_config(cfg)
        is_own = any(os.path.exists(checkpoint / name) for name in TOKENIZER_FILES)
        tokenizer = read_own_tokenizer(checkpoint, base) if is_own else adapters.read_tokenizer(cfg)
        known, embeddings = base.get_text_config().vocab_size, embedding_names(base, cfg)
        rows = rows_needed(shapes, embeddings, known, tokenizer, is_own)
        adapters.check_tokenizer(str(checkpoint), tokenizer, rows)
        base.get_text_config().vocab_size = rows
        adapters.check_device(lora.use_dora, cfg.quantization, adapters.default_device())
        lora = with_embeddings(lora, shapes, embeddings)
        check_shapes(cfg, shapes, expected_shapes(base, lora, cfg), embeddings)
    return Tuned(checkpoint, cfg, lora, tokenizer, rows if rows != known else None)


@contextmanager
def told_of(checkpoint: Path) -> Iterator[None]:
    """Let errors about settings speak of the adapter that has them, and of the options of test.py."""
    try:
        yield
    except (SettingsError, RunError) as error:
        words = str(error).replace(f"model.name={checkpoint}: ", "")
        for setting, option in OPTIONS.items():
            words = words.replace(setting, option)
        mark = f"--peft-path={checkpoint}: "
        raise type(error)(words if words.startswith(mark) else mark + words) from error


def weights_file(checkpoint: Path) -> Path:
    """Where the adapter's tensors are, in the order in which PEFT looks for them."""
    for name in (adapters.ADAPTER_FILE, PICKLED_FILE):
        if os.path.exists(checkpoint / name):
            return checkpoint / name
    raise SettingsError(
        f"--peft-path={checkpoint}: has no {adapters.ADAPTER_FILE} (or {PICKLED_FILE}); copy the adapter again"
    )


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapter's tensors with their names. A pickle is read as data only: it cannot run code."""
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("it is a Git LFS pointer, not the file itself: run `git lfs pull` there")
    if file.name == PICKLED_FILE:
        yield from torch.load(file, map_location="cpu", weights_only=True).items()
    else:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors. Raises SettingsError if they cannot be read, or are not finite."""
    file, shapes = weights_file(checkpoint), {}
    try:
        for name, tensor in read_tensors(file):
            if not torch.isfinite(tensor.float()).all():
                raise ValueError(f"{name} is not finite: its training diverged")
            shapes[name] = tuple(tensor.shape)
    except pickle.UnpicklingError as error:
        raise SettingsError(
            f"--peft-path={checkpoint}: {file.name} is damaged, or holds more than tensors and could run code; "
            "copy the adapter again, or save it as safetensors where you trust it"
        ) from error
    except Exception as error:  # a torn file can raise anything
        raise SettingsError(
            f"--peft-path={checkpoint}: {file.name} cannot be read ({shortened(error, 200)}); copy the adapter again"
        ) from error
    return shapes


def read_own_tokenizer(checkpoint: Path, base: PreTrainedConfig) -> Any:
    """The tokenizer that lies with the adapter. Raises SettingsError if it does not load, or has no EOS."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except Exception as error:  # its files may hold anything
        raise SettingsError(
            f"--peft-path={checkpoint}: the tokenizer in this folder cannot be loaded ({shortened(error, 200)}); "
            f"remove {', '.join(TOKENIZER_FILES)} to use the base model's"
        ) from error
    if tokenizer.eos_token_id is None:
        raise SettingsError(f"--peft-path={checkpoint}: the tokenizer in this folder has no eos_token")
    tokenizer.name_or_path = base.name_or_path  # where `dataset.end_ids` finds what else ends an answer of this model
    return tokenizer


def embedding_names(base: PreTrainedConfig, cfg: ModelConfig) -> list[str]:
    """The modules with a row for each token: input and output embeddings."""
    empty = adapters.empty_model(base, cfg)
    layers = (empty.get_input_embeddings(), empty.get_output_embeddings())
    return [name for name, module in empty.named_modules() if any(module is layer for layer in layers)]


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
    saved = {shape[0] for name, shape in shapes.items() if is_whole(name, embeddings) and shape}
    tokens = max(tokenizer.get_vocab().values()) + 1
    if not saved:
        return max(known, tokens) if is_own else known
    rows = max(saved)
    if len(saved) > 1 or (tokens > rows and (is_own or rows < known)):
        raise SettingsError(
            f"its embeddings have {' and '.join(map(str, sorted(saved)))} rows, its tokenizer {tokens} tokens; copy "
            "the adapter again, with the tokenizer that it was trained with"
        )
    return rows


def with_embeddings(lora: LoraConfig, shapes: Mapping[str, Any], embeddings: Sequence[str]) -> LoraConfig:
    """`lora` with saved embeddings as modules of the adapter, so that the base model's own stay beside them."""
    listed = list(lora.modules_to_save or [])
    saved = [name for name in embeddings if f"{PREFIX}{name}.weight" in shapes]
    lora.modules_to_save = [*listed, *(name for name in saved if not name.endswith(tuple(listed)))] or None
    return lora


def expected_shapes(base: PreTrainedConfig, lora: LoraConfig, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What PEFT saves of an adapter with these settings. Raises SettingsError if it cannot make one in this model."""
    chosen = copy.deepcopy(lora)
    chosen.init_lora_weights = True  # others, such as PiSSA, need the weights
    empty = adapters.empty_model(base, cfg)
    try:
        with torch.device("meta"):
            model = get_peft_model(empty, chosen)
        saved = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    except Exception as error:  # a field may hold anything
        raise SettingsError(f"adapter_config.json does not fit the base model ({shortened(error, 200)})") from error
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def check_shapes(
    cfg: ModelConfig,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    embeddings: Sequence[str],
) -> None:
    """Raise SettingsError if the adapter does not fit the base model."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name) and not (name not in expected and is_whole(name, embeddings)):
            raise SettingsError(
                f"does not fit the base model {cfg.name}: {name} is {found.get(name)}, "
                f"the base model needs {expected.get(name)}"
            )


def choose_template(name: str | None, checkpoint: Path, tokenizer: Any) -> str:
    """The chat template: the one asked for, else the adapter's own, else the tokenizer's, else Alpaca's."""
    file = checkpoint / adapters.TEMPLATE_FILE
    try:
        if name is not None or not os.path.exists(file):
            own = own_template(tokenizer) if name is None else None
            if own is not None:
                return own
            file = find_template(name or "alpaca")
        return on_one_day(file.read_text(encoding="utf-8"))
    except SettingsError as error:
        words = str(error).replace("dataset.template=tokenizer", "--template").replace(", tokenizer", "")
        raise SettingsError(words.replace("dataset.template", "--template")) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--template={file}: cannot be read ({error}); use a text file in UTF-8") from error


def resize(base: Any, rows: int) -> None:
    """Give the embeddings of `base` as many `rows` as the adapter needs.

    A new row is the mean of the others, until the adapter brings its own: no answer prefers such a token.
    """
    known = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            if layer is not None and rows > known:
                layer.weight[known:] = layer.weight[:known].float().mean(0).to(layer.weight.dtype)
