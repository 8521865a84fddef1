"""Checkpoints: written whole or not at all, known to be damaged by their digests, unable to run code.

A checkpoint is a folder `peft_<round>/`: the adapter in PEFT's format with its chat template, `state.json` with the
clients' data positions, the strategy's own state (`strategy.safetensors` and a part of state.json), and sha256.json
with a digest of every file that is loaded.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

import model as adapters
from model import Adapter
from runs.reading import parsed
from runs.runfolder import folder_of, rounds_in
from settings.resume import BEST_LINK
from settings.schema import SettingsError
from utils import sync, torn_files, write_digests, write_json

log = logging.getLogger(__name__)

STATE_FILE, STRATEGY_FILE = "state.json", "strategy.safetensors"
StrategyState = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass(frozen=True)
class State:
    """What a run knows after a whole round, besides the metrics: enough to resume from here."""

    adapter: Adapter
    round_number: int = 0
    rows_seen: dict[int, int] = field(default_factory=dict)  # by partition id; repetitions are counted
    elapsed_s: float = 0.0  # that the rounds took so far, in all processes that the run had
    strategy: StrategyState = field(default_factory=lambda: ({}, {}))  # what `strategy_state` said then


def save(
    run: Path, state: State, lora: LoraConfig, template: str, facts: Mapping[str, Any], write: Callable[[Path], None]
) -> None:
    """Write `peft_<round>/` beside, with `facts` and what `write` adds, then rename it; on disk when this returns."""
    folder = folder_of(run, state.round_number)
    beside = folder.with_suffix(".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    adapters.save_adapter(beside, state.adapter, lora, template)
    values, arrays = state.strategy
    if arrays:
        save_file(arrays, beside / STRATEGY_FILE)
    content = {
        "round": state.round_number,
        "elapsed_s": state.elapsed_s,
        "rows_seen": {str(p): n for p, n in sorted(state.rows_seen.items())},
        "strategy": values,
        **facts,
    }
    write_json(beside / STATE_FILE, content)
    write(beside)
    write_digests(beside)
    sync(*beside.iterdir(), beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    sync(run)


def load(run_folder: Path, round_number: int, strategy: Strategy, shapes: Mapping[str, tuple[int, ...]]) -> State:
    """The state after a round, to which `strategy` is set too. Raises ValueError for a damaged or another adapter's."""
    folder = folder_of(run_folder, round_number)
    if torn := torn_files(folder):
        raise ValueError(f"damaged: {', '.join(torn)}")
    adapter = adapters.load_adapter(folder)
    if {name: value.shape for name, value in adapter.items()} != {n: tuple(shape) for n, shape in shapes.items()}:
        raise ValueError("its adapter has other tensors than model.lora makes")
    content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    file = folder / STRATEGY_FILE
    kept = content["strategy"], load_file(file) if file.exists() else {}
    restore_strategy(strategy, *kept)
    rows_seen = {int(partition): int(rows) for partition, rows in content["rows_seen"].items()}
    return State(adapter, round_number, rows_seen, float(content["elapsed_s"]), kept)


def newest(
    run_folder: Path, strategy: Strategy, shapes: Mapping[str, tuple[int, ...]], most: int, warn: Callable[[str], None]
) -> State | None:
    """The newest state of at most `most` rounds whose checkpoint is whole. One that is damaged is set aside.

    One that cannot be read now is not damaged: OSError and MemoryError are raised, as what `restore_strategy` raises.
    """
    for number in (number for number in rounds_in(run_folder) if number <= most):
        try:
            return load(run_folder, number, strategy, shapes)
        except (OSError, MemoryError, SettingsError):
            raise
        except Exception as error:  # a damaged file can raise anything
            folder = folder_of(run_folder, number)
            warn(f"{folder.name} cannot be used ({error}); it is now {folder.name}.damaged, and the one before is used")
            shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
            folder.rename(folder.with_suffix(".damaged"))
    return None


def prune(run_folder: Path, keep: int | None, best: int | None, spare: Collection[int] = ()) -> None:
    """Remove what need not stay: the newest `keep` checkpoints do (None: all), besides that of round `best`.

    Those of the rounds `spare`, which were only written because they were the best for a while, do not.
    """
    rounds = rounds_in(run_folder)
    kept = [number for number in rounds if number != best and (number == rounds[0] or number not in spare)][:keep]
    for number in rounds:
        if number != best and number not in kept:
            shutil.rmtree(folder_of(run_folder, number))


def spare(run_folder: Path) -> list[int]:
    """The rounds whose checkpoints say that they were only written because they were the best so far."""
    noted = {n: parsed(folder_of(run_folder, n) / STATE_FILE, json.loads, dict) for n in rounds_in(run_folder)}
    return [number for number, content in noted.items() if content.get("only_as_best") is True]


def point_to(run_folder: Path, best: int | None) -> None:
    """Let `best/` point to the checkpoint of round `best`, if there is one."""
    link, beside = run_folder / BEST_LINK, run_folder / f"{BEST_LINK}.tmp"
    if best is None or not folder_of(run_folder, best).is_dir():
        return
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(folder_of(run_folder, best).name)
        beside.replace(link)
    except OSError as error:  # a file system without links: results.json says it too
        log.warning("%s cannot point to round %s (%s)", link, best, error)


# --- the state of any Flower strategy -------------------------------------------------------------


def attributes(strategy: Strategy, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of all that a strategy holds, and of the strategy that it may wrap."""
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):
            yield from attributes(value, f"{prefix}{name}.")
        elif not callable(value) and not isinstance(value, logging.Logger):
            yield prefix + name, value


def strategy_state(strategy: Strategy) -> StrategyState:
    """A copy of what a strategy has become since it was made: momenta, clipping norms, arrays that it compares with.

    Returns:
        JSON values by attribute name, and arrays by `attribute|tensor`. A value of `{"kind": ...}` says what the
        arrays are in: ArrayRecord, dict, list, ndarray; `unknown` is what cannot be kept.
    """
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for key, value in attributes(strategy):
        parts = parts_of(value)
        if all(isinstance(part, np.ndarray | np.generic) for part in parts.values()):
            values[key] = {"kind": type(value).__name__}
            arrays |= {f"{key}|{name}": np.array(part, order="C") for name, part in parts.items()}
            continue
        values[key] = {"kind": "unknown"}
        with suppress(TypeError, ValueError):
            if (copied := json.loads(json.dumps(value, allow_nan=False))) == value:
                values[key] = {"kind": "value", "value": copied}
    return values, arrays


def parts_of(value: Any) -> dict[str, Any]:
    """What may be arrays in `value`, by name; itself, if it is nothing of which `RESTORED` knows parts."""
    if isinstance(value, ArrayRecord):
        return {name: array.numpy() for name, array in value.items()}
    if type(value) is list:
        return {str(position): part for position, part in enumerate(value)}
    return value if type(value) is dict and all(isinstance(name, str) for name in value) else {"": value}


RESTORED: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {  # what a kind was, from its parts
    "ArrayRecord": lambda parts: ArrayRecord({name: Array(array) for name, array in parts.items()}),
    "dict": dict,
    "list": lambda parts: [parts[str(position)] for position in range(len(parts))],
    "ndarray": lambda parts: parts[""],
}  # any other is a number of numpy's


def restore_strategy(strategy: Strategy, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Undo `strategy_state`. Raises SettingsError if the strategy held something that a checkpoint cannot keep."""
    for key, kept in values.items():
        kind = kept["kind"]
        *path, name = key.split(".")
        owner: Any = functools.reduce(lambda part, step: vars(part)[step], path, strategy)
        parts = {part.partition("|")[2]: array for part, array in arrays.items() if part.partition("|")[0] == key}
        # a file may have been made by anybody: data into attributes of a strategy, never into classes or functions
        known = isinstance(owner, Strategy) and not hasattr(type(owner), name) and not callable(vars(owner).get(name))
        if kind == "unknown" or not known:
            raise SettingsError(
                f"resume: {key} of {type(strategy).__name__} is nothing that a checkpoint can keep, so the run cannot "
                "be resumed as if it had not been interrupted"
            )
        restored = kept["value"] if kind == "value" else RESTORED.get(kind, lambda parts: parts[""][()])(parts)
        setattr(owner, name, restored)
