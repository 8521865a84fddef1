"""The Hugging Face Hub: asked once, at the start; what it has is downloaded with progress and then read from the cache.

Everything behind this module reads local folders, so that no later step of a run waits for the network. A process
with `HF_HUB_OFFLINE=1` in its environment, such as a worker whose driver has fetched everything, asks nothing.
"""

import contextlib
import errno
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import huggingface_hub
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, tqdm

from config import RunError, SettingsError
from utils import local_path, shortened

log = logging.getLogger(__name__)

PROGRESS = "huggingface_hub.snapshot_download"  # the name of the bar that counts bytes
LINE_S = 30.0  # between two lines about a download, where there is no terminal
ANSWER_S = 10.0  # how long the Hub may take to say what a repository holds
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers finds a model's weights, in its order of preference."""
SMALL = re.compile(r"[^/]+\.(json|model|txt|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja")
"""Configuration, tokenizer and chat templates."""
OTHER_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx)(\.index\.json)?")
ADAPTER_CONFIG = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
UNREACHABLE = (httpx.TransportError, HfHubHTTPError, ConnectionError, TimeoutError)

_folders: dict[tuple[str, bool, bool], Path] = {}  # by model, weights and code: what this process has asked for


def forget() -> None:
    """Let the Hub be asked again for what this process already has: a new run starts in it."""
    _folders.clear()


# --- models ---------------------------------------------------------------------------------------


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
        return local
    folder = cached(name, "model", "main", ["config.json"])
    return None if folder and code and not has_code(folder) else folder


def has_code(folder: Path) -> bool:
    """Whether the Python files that a model's config.json names lie beside it."""
    try:
        classes = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {}).values()
        own = [name for name in classes if isinstance(name, str) and "--" not in name]
        return all((folder / f"{name.split('.')[0]}.py").is_file() for name in own)
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


# --- data sets ------------------------------------------------------------------------------------


def data_builder(key: str, name: str) -> Any:
    """A `datasets` builder of the Hub's data set `name`, its files downloaded.

    Where the Hub cannot be reached, it is what an earlier run has read.

    Raises:
        SettingsError, RunError: as `model_folder`.
    """
    from datasets import load_dataset_builder

    try:
        info = ask(key, name, "dataset")
    except (OfflineModeIsEnabled, RunError) as error:
        with offline():
            try:
                builder = last_builder(name)
            except (OSError, ValueError) as missing:
                if isinstance(error, RunError):
                    raise error from missing
                raise SettingsError(f"{key}: no such local file or folder, and not in the cache ({error})") from error
        log.warning("%s: taken from the cache as it is; %s", key, error)
        return builder
    with refused(key, name, "dataset"):
        builder = load_dataset_builder(name, revision=info.sha)
    mark, files = f"datasets/{name}@{info.sha}/", []
    for file in [str(file) for split in (builder.config.data_files or {}).values() for file in split]:
        if "://" not in file:  # a repository's README could name them, and so make this machine read its own files
            raise SettingsError(f"{key}: it names a file of this machine, {file}")
        files += [file.partition(mark)[2]] if mark in file else []
    download(key, name, "dataset", info, files)
    return builder


def last_builder(name: str) -> Any:
    """The data set `name` as it was read last on this machine."""
    from datasets import config, load_dataset_builder
    from datasets.naming import camelcase_to_snakecase

    try:
        return load_dataset_builder(name)
    except ValueError:  # perhaps because it has several configurations
        owner, _, last = name.rpartition("/")
        folder = "___".join(filter(None, [owner, camelcase_to_snakecase(last)]))
        kept = list(Path(config.HF_DATASETS_CACHE).glob(f"{folder}/*/*/*/"))
        if not kept:
            raise
        return load_dataset_builder(name, max(kept, key=lambda read: read.stat().st_mtime).parts[-3])


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let `datasets` look only into its cache, at once, instead of trying the network several times."""
    import datasets

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


# --- both -----------------------------------------------------------------------------------------


def ask(key: str, name: str, kind: str) -> Any:
    """What the Hub says of a repository: its commit, and its files with their sizes."""
    with refused(key, name, kind):
        return HfApi().repo_info(name, repo_type=kind, timeout=ANSWER_S, files_metadata=True)


def cached(name: str, kind: str, revision: str, files: list[str]) -> Path | None:
    """The folder of a repository in the cache, if it has all of `files`. Asks nobody."""
    try:
        folder = Path(
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=files, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if all((folder / file).is_file() for file in files) else None  # its own check needs a listing


def download(key: str, name: str, kind: str, info: Any, files: list[str]) -> Path:
    """The folder of a repository in the cache, with `files`; those that are missing are downloaded, with progress.

    Args:
        info: what `ask` was told.
    """
    there = cached(name, kind, "main", files)
    if there and there.name == info.sha:
        return there
    with refused(key, name, kind):
        missing = missing_bytes(info, name, kind, files)
        bar = type("Bar", (DownloadBar,), {"what": name, "bytes": missing, "shown": []})
        with shown_progress():
            try:
                return Path(snapshot_download(name, repo_type=kind, allow_patterns=files, tqdm_class=bar))
            finally:
                for shown in bar.shown:  # huggingface_hub leaves it on the terminal, and its cursor behind it
                    shown.close()


@contextlib.contextmanager
def shown_progress() -> Iterator[None]:
    """Show the progress of a download, whatever other bars are turned off; the user's environment decides."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS:
        yield
        return
    enable_progress_bars(PROGRESS)
    try:
        yield
    finally:
        disable_progress_bars(PROGRESS)


def missing_bytes(info: Any, name: str, kind: str, files: Collection[str]) -> int:
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}

    def is_cached(file: str) -> bool:
        return isinstance(try_to_load_from_cache(name, file, revision=info.sha, repo_type=kind), str)

    return sum(sizes.get(file, 0) for file in files if not is_cached(file))


class DownloadBar(tqdm):
    """Bytes, speed and time left of a download: one live line on a terminal, elsewhere a line every half minute."""

    what, bytes = "", 0  # all that are missing, if the Hub told their sizes
    added = 0  # what huggingface_hub adds up file by file
    shown: ClassVar[list[tqdm]] = []

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.live, self.said = sys.stderr.isatty(), time.monotonic()
        form = f"downloading {self.what}: {{n_fmt}}B of {{total_fmt}}B, {{rate_fmt}}, {{remaining}} left"
        shown = settings.get("name") == PROGRESS  # the others count files and transfers
        settings |= {"disable": not shown, "bar_format": form, "leave": False, "file": sys.stderr}
        super().__init__(*arguments, **settings)
        self.shown.append(self)

    @property
    def total(self) -> int:
        return self.bytes or self.added

    @total.setter
    def total(self, added: int | None) -> None:
        self.added = added or 0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.live:
            super().display(msg, pos)
        elif time.monotonic() - self.said > LINE_S:
            print(msg or str(self), file=sys.stderr, flush=True)
            self.said = time.monotonic()


@contextlib.contextmanager
def refused(key: str, name: str, kind: str) -> Iterator[None]:
    """Turn whatever the Hub or the network answers into one line with its cause and what to do.

    Raises:
        OfflineModeIsEnabled: as it comes, for the caller.
        SettingsError: if the Hub has no such repository for this user.
        RunError: if the network, or this machine's disk, fails.
    """
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    what = {"model": "model", "dataset": "data set"}[kind]
    local = {"model": "folder", "dataset": "file or folder"}[kind]
    try:
        yield
    except (OfflineModeIsEnabled, SettingsError, RunError):
        raise
    except GatedRepoError as error:
        logged_in = "" if huggingface_hub.get_token() else ", then log in: hf auth login"
        raise SettingsError(f"{key}: access is granted on request; ask for it at {page}{logged_in}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SettingsError(
            f"{key}: there is no such local {local}, and no such {what} on the Hub; check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except Exception as error:
        causes = list(causes_of(error))
        for cause in causes:
            if isinstance(cause, OfflineModeIsEnabled):
                raise cause from error
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise RunError(
                    f"{key}: {constants.HF_HUB_CACHE} cannot be written ({cause}); make room there, or set HF_HOME"
                ) from error
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if status in (401, 403):
                raise SettingsError(f"{key}: the Hub refuses access ({status}); log in with `hf auth login`") from error
            if isinstance(cause, UNREACHABLE):
                raise RunError(
                    f"{key}: the Hub at {constants.ENDPOINT} cannot be reached, or broke off "
                    f"({shortened(cause, 200) or type(cause).__name__}); try again: files that are complete are kept"
                ) from cause
        raise SettingsError(f"{key}: cannot be loaded from the Hub ({shortened(causes[-1], 300)})") from error


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it: the Hub's client wraps what the network said."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
