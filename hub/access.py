"""How the Hub is asked and downloaded from: with progress, and with one line for whatever goes wrong."""

import contextlib
import errno
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import huggingface_hub
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, tqdm

from settings.schema import RunError, SettingsError
from utils import shortened

PROGRESS = "huggingface_hub.snapshot_download"  # the name of the bar that counts bytes
LINE_S = 30.0  # between two lines about a download, where there is no terminal
ANSWER_S = 10.0  # how long the Hub may take to say what a repository holds
UNREACHABLE = (httpx.TransportError, ConnectionError, TimeoutError)


_asked: dict[tuple[str, str], Any] = {}  # by name and kind: what the Hub has said to this process


def forget() -> None:
    """Let the Hub be asked again for what this process already knows: a new run starts in it."""
    _asked.clear()


def ask(key: str, name: str, kind: str) -> Any:
    """What the Hub says of a repository: its commit, and its files with their sizes. It is asked once."""
    with refused(key, name, kind):
        if (name, kind) not in _asked:
            _asked[name, kind] = HfApi().repo_info(name, repo_type=kind, timeout=ANSWER_S, files_metadata=True)
        return _asked[name, kind]


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
        bar: Any = type("Bar", (DownloadBar,), {"what": name, "bytes": missing, "shown": []})
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
            if isinstance(cause, UNREACHABLE) or (status is not None and status != 404):
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
