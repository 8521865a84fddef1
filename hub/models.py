"""Models of the Hub, and local ones: asked for once, at the start; then everything reads their folder.

No later step of a run waits for the network. A process with `HF_HUB_OFFLINE=1` in its environment, such as a worker
whose driver has fetched everything, asks nothing.
"""

import functools
import json
import re
from collections.abc import Collection
from pathlib import Path

from hub.access import answered, ask, cached, download, files_in, files_of, whole
from settings.schema import SettingsError
from utils import is_lfs_pointer, local_path

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers finds a model's weights, in its order of preference."""
SMALL = re.compile(r"[^/]+\.(json|model|txt|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja")
"""Configuration, tokenizer, chat templates, and the lists of the weights' files."""
ADAPTER_CONFIG = "adapter_config.json"


def forget() -> None:
    """Let the Hub be asked again for what this process already has: a new run starts in it."""
    answered.cache_clear()
    fetch_model.cache_clear()


def model_folder(name: str, *, weights: bool, code: bool = False) -> Path:
    """The local folder of a base model: the one that `name` means, or the Hub's, downloaded if it is not in the cache.

    The Hub is asked once in a process; where it cannot be reached, the cache has to hold the model whole.

    Args:
        weights: also the weights; otherwise only what describes model and tokenizer.
        code: also the Python files of the repository, for `model.trust_remote_code`.

    Raises:
        SettingsError: if this user finds no such model, or none that transformers loads. RunError: without network.
    """
    return local_folder(name, weights) or fetch_model(name, weights, code)


def cached_model(name: str, *, code: bool = False) -> Path | None:
    """The folder of a base model if its config.json, and with `code` the Python files that it names, are here."""
    folder = local_folder(name, weights=True) or cached(name, "model", "main", ["config.json"])
    return None if folder and code and not has_code(folder) else folder


def has_code(folder: Path) -> bool:
    """Whether the Python files that a model's config.json names lie beside it; OWNER/NAME--FILE is in another place."""
    try:
        classes = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {}).values()
        own = [name for name in classes if isinstance(name, str)]
        return all("--" not in name and (folder / f"{name.split('.')[0]}.py").is_file() for name in own)
    except (OSError, ValueError, AttributeError):
        return True  # reading it says what is wrong


def local_folder(name: str, weights: bool) -> Path | None:
    """The folder of this machine that `name` means, if there is one, and it is a model's with its files themselves."""
    folder = local_path(name)
    if folder is None:
        return None
    if not folder.is_dir():
        raise SettingsError(f"model.name={name}: is a file; name the model's folder")
    files = files_in(folder)
    check_files(name, files, weights)
    try:
        for file in small_files(files) + (weight_files(name, folder, files) if weights else []):
            if is_lfs_pointer(folder / file):
                raise SettingsError(
                    f"model.name={name}: {file} is a Git LFS pointer, not the file itself; run `git lfs pull` in "
                    f"{folder}"
                )
    except OSError as error:
        raise SettingsError(f"model.name={name}: {error.filename} cannot be read ({error.strerror})") from error
    return folder


@functools.cache
def fetch_model(name: str, weights: bool, code: bool) -> Path:
    """The folder of the Hub's model in the cache: first what describes it, then the weights that its list names."""
    repository = ask(name, "model")
    with whole(repository):
        files = files_of(repository)
        check_files(name, files, weights or not repository.failure)
        folder = download(repository, small_files(files, code))
        return download(repository, weight_files(name, folder, files), folder.name) if weights else folder


def small_files(files: Collection[str], code: bool = False) -> list[str]:
    """Those of a model's `files` that describe it; without an adapter's, which transformers would put in."""
    wanted = [name for name in files if SMALL.fullmatch(name) or (code and name.endswith(".py"))]
    return [name for name in wanted if name != ADAPTER_CONFIG]


def weight_files(name: str, folder: Path, files: Collection[str]) -> list[str]:
    """Those of a model's `files` that hold its weights, by the list of them in `folder` if they are in shards."""
    first = next(file for file in WEIGHTS if file in files)
    if not first.endswith(".index.json"):
        return [first]
    try:
        index = json.loads((folder / first).read_text(encoding="utf-8"))
        shards = sorted({str(shard) for shard in index["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"model.name={name}: {first} is damaged ({error}); download it again") from error
    if missing := [shard for shard in shards if shard not in files]:
        raise SettingsError(
            f"model.name={name}: its weights are incomplete: {missing[0]} is missing; download it again"
        )
    return shards


def check_files(name: str, files: Collection[str], weights: bool) -> None:
    """Raise SettingsError if `files` are not those of a model that transformers loads; it says what they are."""
    key, gguf = f"model.name={name}", any(file.endswith(".gguf") for file in files) and "only GGUF files"
    if "config.json" not in files and ADAPTER_CONFIG in files:
        raise SettingsError(f"{key}: is an adapter, not a base model; set model.name to its own base model")
    if "config.json" not in files:
        raise SettingsError(f"{key}: holds {gguf or 'no config.json'}; name a model in the format of transformers")
    if weights and not any(file in files for file in WEIGHTS):
        raise SettingsError(
            f"{key}: has no weights that transformers loads: model.safetensors or pytorch_model.bin, whole or in "
            f"shards ({gguf or 'none of them'}); name the original model"
        )
