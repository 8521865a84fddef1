"""How the Hub is asked and downloaded from: with progress, and with one line for whatever goes wrong."""

import contextlib
import errno
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import httpx
import huggingface_hub
from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import enable_progress_bars, tqdm

from settings.schema import RunError, SettingsError
from utils import Bar, shortened

log = logging.getLogger(__name__)

PROGRESS = "huggingface_hub.snapshot_download"  # the name of the bar that counts bytes
ANSWER_S = 10.0  # how long the Hub may take to say what a repository holds
UNREACHABLE = (httpx.TransportError, ConnectionError, TimeoutError)


class Repository(NamedTuple):
    """What the Hub says of a repository, or why it says nothing; then the cache has to do."""

    name: str
    kind: str
    """"model" or "dataset"."""
    commit: str
    """The newest."""
    sizes: dict[str, int]
    """Bytes of each of its files; none, and no commit, if the Hub says nothing."""
    failure: RunError | errors.OfflineModeIsEnabled | None


def ask(name: str, kind: str) -> Repository:
    """What the Hub says of a repository. It is asked until it answers once in a process. Raises as `refused`."""
    try:
        return answered(name, kind)
    except (RunError, errors.OfflineModeIsEnabled) as failure:
        if isinstance(failure, RunError):
            log.warning("what the cache holds is used as it is: %s", failure)
        return Repository(name, kind, "", {}, failure)


@functools.cache
def answered(name: str, kind: str) -> Repository:
    with refused(name, kind):
        info = HfApi().repo_info(name, repo_type=kind, timeout=ANSWER_S, files_metadata=True)
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
    return Repository(name, kind, str(info.sha), sizes, None)


def files_of(repository: Repository) -> list[str]:
    """The files of a repository, where the Hub says nothing as it listed them once, or at least those in the cache."""
    name, kind = repository.name, repository.kind
    with contextlib.suppress(errors.CachedRepoTreeNotFoundError):
        return [*repository.sizes] or [file.path for file in get_cached_repo_tree(name, repo_type=kind)]
    folder = cached(name, kind, "main", [])
    return files_in(folder) if folder else []


def files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def cached(name: str, kind: str, revision: str, files: list[str]) -> Path | None:
    """The folder of a repository in the cache, if it has all of `files`. Asks nobody."""
    try:
        folder = Path(
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=files, local_files_only=True)
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    return folder if all((folder / file).is_file() for file in files) else None  # its own check needs a listing


def download(repository: Repository, files: list[str], commit: str | None = None) -> Path:
    """The folder of a `repository` in the cache, with `files`; those that are missing are downloaded, with progress.

    Args:
        commit: of an earlier download that this one adds to; by default the newest, which the cache then calls main.

    Raises as `refused`.
    """
    name, kind, newest, sizes, failure = repository
    folder = cached(name, kind, commit or "main", files)
    if folder and (failure or folder.name == (commit or newest)):
        return folder
    if failure:
        raise failure
    in_cache = functools.partial(try_to_load_from_cache, name, repo_type=kind, revision=commit or newest)
    missing = sum(sizes.get(file, 0) for file in files if not isinstance(in_cache(file), str))
    bar: Any = type("Bar", (DownloadBar,), {"what": name, "bytes": missing, "shown": []})
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:  # the user's environment decides, whatever other bars are turned off
        enable_progress_bars(PROGRESS)
    with refused(name, kind):
        try:
            return Path(snapshot_download(name, repo_type=kind, revision=commit, allow_patterns=files, tqdm_class=bar))
        finally:
            for shown in bar.shown:  # huggingface_hub leaves it on the terminal, and its cursor behind it
                shown.close()


class DownloadBar(Bar, tqdm):
    what, bytes = "", 0  # all that are missing: huggingface_hub's own total grows file by file
    shown: ClassVar[list[tqdm]] = []

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        form = f"downloading {self.what}: {{n_fmt}}B of {{total_fmt}}B, {{rate_fmt}}, {{remaining}} left"
        is_shown = settings.get("name") == PROGRESS  # the others count files and transfers
        super().__init__(*arguments, **settings | {"disable": not is_shown, "bar_format": form})
        self.shown.append(self)

    total = property(lambda self: self.bytes, lambda self, _: None)


@contextlib.contextmanager
def whole(repository: Repository) -> Iterator[None]:
    """Say what keeps the Hub from answering where the cache does not hold all of what is needed of a repository."""
    try:
        yield
    except (SettingsError, errors.OfflineModeIsEnabled) as error:
        name, kind, failure = repository.name, repository.kind, repository.failure
        if failure is None or str(error).startswith(("dataset.split=", "dataset.subset=")):  # the user's to choose
            raise
        if isinstance(failure, RunError):
            raise failure from error
        what, options = {"model": ("folder", ""), "dataset": ("file or folder", " --repo-type=dataset")}[kind]
        raise SettingsError(
            f"{kind}.name={name}: no such local {what}, and not whole in the cache ({failure}); download it first: "
            f"hf download {name}{options}"
        ) from error


@contextlib.contextmanager
def refused(name: str, kind: str) -> Iterator[None]:
    """Turn whatever the Hub or the network answers into one line with its cause and what to do.

    Raises:
        OfflineModeIsEnabled: for the caller, who knows what the cache has.
        SettingsError: if the Hub has no such repository for this user. RunError: if the network, or the disk, fails.
    """
    try:
        yield
    except Exception as error:
        causes = list(causes_of(error))
        known = next(filter(None, (explained(cause, name, kind) for cause in causes)), None)
        other = f"{kind}.name={name}: cannot be loaded from the Hub ({shortened(causes[-1], 300)})"
        raise (known or SettingsError(other)) from error


def explained(cause: BaseException, name: str, kind: str) -> Exception | None:
    """The line for one of the errors that led to a failure; None if another one says more."""
    key = f"{kind}.name={name}"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    match cause:
        case errors.OfflineModeIsEnabled():
            return errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
            logged_in = "" if huggingface_hub.get_token() else ", then log in: hf auth login"
            return SettingsError(f"{key}: access is granted on request; ask for it at {page}{logged_in}")
        case errors.RepositoryNotFoundError() | errors.HFValidationError():
            what = {"model": "folder, and no such model", "dataset": "file or folder, and no such data set"}[kind]
            return SettingsError(
                f"{key}: there is no such local {what} on the Hub; check the name, or log in with `hf auth login` if "
                "it is private"
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EACCES | errno.EROFS):
            where = constants.HF_HUB_CACHE
            return RunError(f"{key}: {where} cannot be written ({cause}); make room there, or set HF_HOME")
        case _ if status in (401, 403):
            return SettingsError(f"{key}: the Hub refuses access ({status}); log in with `hf auth login`")
        case _ if isinstance(cause, UNREACHABLE) or status not in (None, 404):
            return RunError(
                f"{key}: the Hub at {constants.ENDPOINT} cannot be reached, or broke off "
                f"({shortened(cause, 200) or type(cause).__name__}); try again: files that are complete are kept"
            )
    return None


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it: the Hub's client wraps what the network said."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
