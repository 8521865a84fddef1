"""Models of the Hub, and local ones: asked for once, at the start; then everything reads their folder.

No later step of a run waits for the network. A process with `HF_HUB_OFFLINE=1` in its environment, such as a worker
whose driver has fetched everything, asks nothing.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path

from huggingface_hub import get_cached_repo_tree, hf_hub_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from hub import access
from hub.access import ask, cached, download, refused
from settings.schema import RunError, SettingsError
from utils import local_path

log = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers finds a model's weights, in its order of preference."""
SMALL = re.compile(r"[^/]+\.(json|model|txt|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja")
"""Configuration, tokenizer and chat templates."""
OTHER_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx)(\.index\.json)?")
ADAPTER_CONFIG = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_folders: dict[tuple[str, bool, bool], Path] = {}  # by model, weights and code: what this process has asked for


def forget() -> None:
    """Let the Hub be asked again for what this process already has: a new run starts in it."""
    access.forget()
    _folders.clear()


def model_folder(name: str, *, weights: bool, code: bool = False) -> Path:
    """The local folder of a base model: the one that `name` means, or the Hub's, downloaded if it is not in the cache.

    The Hub is asked once in a process; where it cannot be reached, the cache has to hold the model whole.

    Args:
        weights: also the weights; otherwise only what describes model and tokenizer.
        code: also the Python files of the repository, for `model.trust_remote_code`.

    Raises:
        SettingsError: if there is no such model, it is not open to this user, or it is not one that transformers loads.
        RunError: if the network fails.
    """
    if local := local_path(name):
        check_local(name, local, weights)
        return local
    if (name, True, code) in _folders:
        return _folders[name, True, code]
    if (name, weights, code) not in _folders:
        _folders[name, weights, code] = fetch_model(name, weights, code)
    return _folders[name, weights, code]


def cached_model(name: str, *, code: bool = False) -> Path | None:
    """The folder of a base model if it is on this machine, at least config.json. Asks nobody.

    Args:
        code: only with the Python files that config.json names.
    """
    if local := local_path(name):
        check_local(name, local, weights=True)
        return None if code and not has_code(local) else local
    folder = cached(name, "model", "main", ["config.json"])
    return None if folder and code and not has_code(folder) else folder


def has_code(folder: Path) -> bool:
    """Whether the Python files that a model's config.json names lie beside it; OWNER/NAME--FILE is in another place."""
    try:
        classes = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {}).values()
        own = [name for name in classes if isinstance(name, str)]
        return all("--" not in name and (folder / f"{name.split('.')[0]}.py").is_file() for name in own)
    except (OSError, ValueError, AttributeError):
        return True  # reading it says what is wrong


def fetch_model(name: str, weights: bool, code: bool) -> Path:
    key = f"model.name={name}"
    try:
        info = ask(key, name, "model")
    except OfflineModeIsEnabled:
        return cached_whole(key, name, weights, code, "HF_HUB_OFFLINE is set")
    except RunError as error:
        return cached_whole(key, name, weights, code, str(error.__cause__), error)
    files = [entry.rfilename for entry in info.siblings or []]
    check_files(key, files)

    def read(file: str) -> str:
        with refused(key, name, "model"), disable_progress_bars():
            return Path(hf_hub_download(name, file, revision=info.sha)).read_text(encoding="utf-8")

    return download(key, name, "model", info, wanted_files(key, files, read, weights, code))


def cached_whole(key: str, name: str, weights: bool, code: bool, reason: str, error: RunError | None = None) -> Path:
    """The model in the cache.

    Raises:
        SettingsError, or `error`: if it is not there, or not whole.
    """
    folder = cached_model(name)
    if folder:
        with contextlib.suppress(OSError, SettingsError):
            files = listed(name, folder)
            check_files(key, files, weights)
            wanted = wanted_files(key, files, lambda file: (folder / file).read_text(encoding="utf-8"), weights, code)
            if cached(name, "model", "main", wanted):
                if error:
                    log.warning("%s: taken from the cache as it is; %s", key, error)
                return folder
    missing = "not in the cache" if folder is None else "not whole in the cache"
    raise error or SettingsError(
        f"{key}: no such local folder, and {missing} ({reason}); download it first: hf download {name}"
    )


def listed(name: str, folder: Path) -> list[str]:
    """The files of a repository in the cache, as the Hub listed them, or at least those that are there."""
    try:
        return [file.path for file in get_cached_repo_tree(name)]
    except CachedRepoTreeNotFoundError:
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def wanted_files(key: str, files: Collection[str], read: Callable[[str], str], weights: bool, code: bool) -> list[str]:
    """Those of a model's `files` that transformers reads.

    Args:
        read: gives the text of one of them.
    """
    wanted = [name for name in files if SMALL.fullmatch(name) and not OTHER_WEIGHTS.fullmatch(name)]
    wanted = [name for name in wanted if name != ADAPTER_CONFIG]  # transformers would put the adapter in
    wanted += [name for name in files if code and name.endswith(".py")]
    return wanted + (weight_files(key, files, read) if weights else [])


def weight_files(key: str, files: Collection[str], read: Callable[[str], str]) -> list[str]:
    """The files that hold a model's weights, the index that names them included."""
    first = next((name for name in WEIGHTS if name in files), None)
    if first is None or not first.endswith(".index.json"):
        return [first] if first else []
    try:
        shards = sorted({str(shard) for shard in json.loads(read(first))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{key}: {first} is damaged ({error}); download it again") from error
    if missing := [shard for shard in shards if shard not in files]:
        raise SettingsError(f"{key}: its weights are incomplete: {missing[0]} is missing; download it again")
    return [first, *shards]


def check_files(key: str, files: Collection[str], weights: bool = True) -> None:
    """Raise SettingsError if `files` are not those of a model that transformers loads; it says what they are."""
    if "config.json" not in files:
        if ADAPTER_CONFIG in files:
            raise SettingsError(f"{key}: is an adapter, not a base model; set model.name to its own base model")
        what = "only GGUF files" if any(name.endswith(".gguf") for name in files) else "no config.json"
        raise SettingsError(f"{key}: holds {what}; name a model in the format of transformers")
    if weights and not any(name in files for name in WEIGHTS):
        what = "only GGUF files" if any(name.endswith(".gguf") for name in files) else "none of them"
        raise SettingsError(
            f"{key}: has no weights that transformers loads: model.safetensors or pytorch_model.bin, whole or in "
            f"shards ({what}); name the original model"
        )


def check_local(name: str, folder: Path, weights: bool) -> None:
    """As `check_files` and `weight_files`, of a folder of this machine; also, that what is read is no LFS pointer."""
    key = f"model.name={name}"
    if not folder.is_dir():
        raise SettingsError(f"{key}: is a file; name the model's folder")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    check_files(key, files, weights)
    try:
        for file in wanted_files(key, files, lambda file: (folder / file).read_text(encoding="utf-8"), weights, False):
            if (folder / file).stat().st_size < 1024 and (folder / file).read_bytes().startswith(LFS_POINTER):
                raise SettingsError(
                    f"{key}: {file} is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}"
                )
    except OSError as error:
        raise SettingsError(f"{key}: {error.filename} cannot be read ({error.strerror})") from error
