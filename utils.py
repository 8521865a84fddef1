"""Small helpers that several modules share: paths, schedule, seeds, environment, logging, files, metrics."""

import atexit
import functools
import gc
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import resource
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from rich import filesize
from tqdm import tqdm

DIGESTS_FILE, CARD_FILE, PLOT_FILE = "sha256.json", "README.md", "train_loss.png"
FOR_PEOPLE = (CARD_FILE, PLOT_FILE)  # files of a checkpoint that nothing loads: their owner may change them
SILENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LINE_S = 30.0  # between two lines about what takes long, where there is no terminal
SUITE_FOLDER = Path(__file__).resolve().parent


def local_path(name: str) -> Path | None:
    """The file or folder that `name` means: as given, or one that the suite ships; None if there is none."""
    try:
        given = Path(name).expanduser()
        return given if given.exists() else shipped_path(name)
    except (OSError, RuntimeError):  # too long for a path, or the home of nobody
        return None


def shipped_path(name: str) -> Path | None:
    """The file or folder `name` inside the suite; None if the suite ships none of that name.

    Flower's app bundle cannot hold weights or templates: from inside one, they are found in the
    folder from which `pip install -r requirements.txt` installed the suite.
    """
    if ".." in Path(name).parts:  # it says from where a user sees it, which may lead back here by chance
        return None
    for suite in (SUITE_FOLDER, installed_folder()):
        if suite and (suite / name).exists() and (suite / name).resolve().is_relative_to(suite.resolve()):
            return suite / name
    return None


@functools.cache
def installed_folder() -> Path | None:
    """The suite's folder, if it is installed in this environment."""
    try:
        origin = importlib.metadata.distribution("llm-flowertune").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(url2pathname(urlsplit(json.loads(origin)["url"]).path)) if origin else None


def cosine_learning_rate(round_number: int, num_rounds: int, highest: float, lowest: float) -> float:
    """Learning rate of a round in 1..num_rounds: `highest` in the first, `lowest` in the last, cosine between."""
    if num_rounds == 1:
        return highest
    progress = (round_number - 1) / (num_rounds - 1)
    return lowest + 0.5 * (highest - lowest) * (1 + math.cos(math.pi * progress))


def seed_of(*key: str | int) -> int:
    """A 63-bit seed for each key, such as ("dropout", seed, round, partition); no two keys share one."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(*key: str | int) -> np.random.Generator:
    """A generator of its own for each key. numpy's own seeding would take (0, 1) and (0, 1, 0) for the same."""
    return np.random.default_rng(seed_of(*key))


all_distributions = functools.cache(importlib.metadata.packages_distributions)


class OwnNames(dict[str, list[str]]):
    """Which distributions each package comes from.

    `names[package]`, as trl asks, is one of the package's own name, without a look at all that is installed. `get`
    looks: transformers keeps these names as long as the process lives, and asks them which FlashAttention there is.
    """

    def __missing__(self, package: str) -> list[str]:
        return [package]

    def get(self, package: str, default: Any = None) -> Any:
        return all_distributions().get(package, default)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports here take two thirds of the time. They do without garbage collection, and what they made is left out of
    later ones. They do without SciPy, which transformers imports for losses of other tasks, and without trl's look at
    all installed packages: both are slow, and neither is used."""
    before, hides = len(sys.modules), "scipy" not in sys.modules  # not if a call around this one does
    gc.disable()
    sys.modules.setdefault("scipy", cast(Any, None))
    try:
        with patch.object(importlib.metadata, "packages_distributions", OwnNames):
            yield
    finally:
        if hides and sys.modules.get("scipy", quick_imports) is None:
            del sys.modules["scipy"]
        gc.enable()
        if len(sys.modules) > before:
            gc.freeze()


def send_nothing_home() -> None:
    """Turn off what libraries would report to their makers, unless the user's environment turns it on.

    To be called before they are imported. The last one stops transformers from asking for converted weights.
    """
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)


def leave_unusable_home() -> None:
    """Where the home folder cannot be written, let libraries keep their files in a folder that ends with this process.

    What the Hugging Face cache there holds can still be read. To be called before they are imported.
    """
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  Path's own raises for the home of nobody
    try:
        (home / ".cache").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home / ".cache"):
            return
    except OSError:
        folder = tempfile.mkdtemp(prefix="flowertune-home-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if (kept := home / ".cache" / "huggingface" / "hub").is_dir() and "HF_HOME" not in os.environ:
        os.environ.setdefault("HF_HUB_CACHE", str(kept))
    os.environ["HOME"] = folder
    reason = "cannot be written; what libraries keep there is kept for this run only"
    print(f"warning: the home folder {home} {reason}", file=sys.stderr)


def log_to_file(path: Path) -> None:
    """Let this process log to `path` (once), and only there: what libraries print is for the log, not the user."""
    files = [getattr(handler, "baseFilename", "") for handler in logging.getLogger().handlers]
    if path.parent.is_dir() and str(path) not in files:
        form = "[%(asctime)s][%(name)s][%(levelname)s][%(process)d] - %(message)s"
        logging.basicConfig(filename=path, format=form, level=logging.INFO, force=True)
        quiet_libraries()


def quiet_libraries() -> None:
    """Send the warnings of the libraries to the log instead of the terminal, and turn their progress bars off."""
    import datasets
    from flwr.supercore.logger import FLOWER_LOGGER, console_handler

    quiet_transformers()
    datasets.disable_progress_bars()
    FLOWER_LOGGER.removeHandler(console_handler)
    FLOWER_LOGGER.propagate = True


def quiet_transformers() -> None:
    """Send warnings and the messages of transformers to the log, if there is one, and turn progress bars off."""
    import transformers

    logging.captureWarnings(True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one for each layer
    logging.getLogger().addHandler(logging.NullHandler())  # without any handler, Python writes to stderr
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    transformers.logging.disable_progress_bar()
    for name in ("huggingface_hub", "datasets"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def shortened(text: object, width: int) -> str:
    """`text` on one line of at most `width` characters, cut between two words; a single long word is cut itself."""
    words = " ".join(str(text).split())
    whole = textwrap.shorten(words, width, placeholder=" ...", break_on_hyphens=False)
    return whole if whole.strip(". ") or not words else words[: width - 4] + " ..."


def printable(text: str) -> str:
    """`text` of somebody else, safe to print: no escape sequences, nothing that turns the writing's direction."""
    return "".join(mark if mark.isprintable() or mark in "\n\t" else "\ufffd" for mark in text)


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line to a JSONL file, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    sync(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole JSON file or nothing: beside it first, then renamed into place."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a whole file or nothing: beside it first, then renamed into place; on disk when this returns."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.unlink(missing_ok=True)  # of a process that was killed, or a link to somewhere else
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
        sync(beside)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def sync(*paths: Path) -> None:
    """Return when these files and folders are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_digests(folder: Path) -> None:
    """Note the SHA-256 of every file in `folder` but FOR_PEOPLE, for `torn_files`."""
    files = [file for file in sorted(folder.iterdir()) if file.name not in FOR_PEOPLE]
    write_json(folder / DIGESTS_FILE, {file.name: file_sha256(file) for file in files})


def torn_files(folder: Path) -> list[str]:
    """Files of `folder` that are missing, or not what `write_digests` saw: damage is found, an attacker is not."""
    try:
        digests = dict(json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return [DIGESTS_FILE]
    return sorted(name for name, digest in digests.items() if file_sha256(folder / name) != digest)


def let_others_read(*paths: Path) -> None:
    """Give files the mode of ordinary new ones: safetensors writes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content; empty if there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Whether only Git's note about a large file is there, in place of the file itself."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file up to the first that is not whole; none if there is no such file."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def totals_so_far(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results.json says of a run, as far as the lines of metrics.jsonl tell; nothing without lines.

    `bytes_per_point` are those that lowered the held-out loss by 1.0 (nat).
    """
    if not metrics:
        return {}
    losses, held_out = [float(line["train_loss"]) for line in metrics], held_out_losses(metrics)
    totals = {
        "rounds": len(metrics),
        "final_train_loss": losses[-1],
        "best_train_loss": min(losses),
        "bytes_down": sum(line.get("bytes_down", 0) for line in metrics),
        "bytes_up": sum(line.get("bytes_up", 0) for line in metrics),
        "seconds": sum(line.get("seconds", {}).get("wall", 0.0) for line in metrics),
        "peak_memory_bytes": max(line.get("peak_memory_bytes", 0) for line in metrics),
    }
    if held_out:
        last, best = max(held_out), best_round(metrics) or max(held_out)
        sent = sum(bytes_sent(line) for line in metrics if line["round"] <= last)
        gained = held_out.get(0, 0.0) - held_out[last]
        totals |= {
            "held_out_loss_before": held_out.get(0),
            "held_out_loss": held_out[last],
            "held_out_round": last,
            "best_held_out_loss": held_out[best],
            "best_round": best,
            "bytes_per_point": sent / gained if gained > 0 else None,
        }
    return totals


def bytes_sent(found: Mapping[str, Any]) -> int:
    """Down and up, by a line of metrics.jsonl or by results.json."""
    return int(found.get("bytes_down", 0) + found.get("bytes_up", 0))


def objective(summary: Mapping[str, Any]) -> float:
    """What a sweeper minimises: the lowest held-out loss, or without one the last training loss."""
    return float(summary.get("best_held_out_loss", summary["final_train_loss"]))


def held_out_losses(metrics: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Held-out loss by round, 0 for before the first: of `dataset.eval_name` if that was measured, else of clients."""
    measured = [(0, line.get("held_out_before", {})) for line in metrics[:1]]
    measured += [(line["round"], line.get("held_out", {})) for line in metrics]
    for kind in ("global", "clients"):
        if losses := {number: float(scores[kind]["loss"]) for number, scores in measured if scores.get(kind)}:
            return losses
    return {}


def best_round(metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """The round after which the held-out loss was lowest, if it was measured."""
    losses = {number: loss for number, loss in held_out_losses(metrics).items() if number}
    return min(losses, key=losses.__getitem__, default=None)


def peak_resident_bytes() -> int:
    """Most main memory that this process held since `forget_peak`, or ever."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Let `peak_resident_bytes` start again from now, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def bytes_text(count: float) -> str:
    """A byte count for people: 67.1 MB. Decimal units."""
    return filesize.decimal(int(count))


def seconds_text(seconds: float) -> str:
    """A duration for people: 1h 02m, 3m 20s or 12.3s."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


class Bar(tqdm):
    """How far something has come: one live line on a terminal, elsewhere a line every half minute."""

    monitor_interval = 0  # no thread of its own

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.live, self.said = sys.stderr.isatty(), time.monotonic()
        look = {"bar_format": None if self.live else "{desc}{percentage:.0f}%", "leave": False}
        super().__init__(*arguments, **look | settings | {"file": sys.stderr if self.live else io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if self.live:
            return super().display(msg, pos)
        if time.monotonic() - self.said > LINE_S:
            print(msg or str(self), file=sys.stderr, flush=True)
            self.said = time.monotonic()
        return None
