"""A run folder: one process at a time, the settings that it was started with, and how it goes on after an end."""

import fcntl
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config import RunConfig, SettingsError
from utils import write_json

SETTINGS_FILE, METRICS_FILE, RESULTS_FILE, ERROR_FILE = "settings.json", "metrics.jsonl", "results.json", "error.txt"
MAY_CHANGE = (  # settings that a run may go on with changed: they decide how it is done, not what is computed
    "resume", "resume_sweep", "dry_run", "tracker", "ray", "client_resources", "model.cache_folder",
    "train.micro_batch_size", "train.keep_checkpoints", "train.save_every_round",
    "train.training_arguments.gradient_checkpointing", "strategy.round_timeout_s", "strategy.min_replies",
    "strategy.round_retries",
)  # fmt: skip
RESUME = re.compile(r"\+{0,2}resume(?:_sweep)?=")
SAFE_TARGETS = ("flwr.serverapp.strategy.", "flwr_datasets.partitioner.")


def folder_of(run_folder: Path, round_number: int) -> Path:
    return run_folder / f"peft_{round_number}"


def rounds_in(run_folder: Path) -> list[int]:
    """Rounds that have a checkpoint, whole or damaged, newest first."""
    names = (folder.name.removeprefix("peft_") for folder in run_folder.glob("peft_*") if folder.is_dir())
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def continued(arguments: Sequence[str]) -> list[str]:
    """The command line that `resume=FOLDER` stands for: the run's own, in its own folder, and what is given beside.

    Raises:
        SettingsError: if there is no run in the folder, or its settings would run code that is not Flower's.
    """
    folders = [
        argument.partition("=")[2].strip("'\"") for argument in arguments if re.match(r"\+{0,2}resume=", argument)
    ]
    if not folders or folders[-1] == "null":
        return list(arguments)
    folder = Path(folders[-1])
    if "--multirun" in arguments or "-m" in arguments:
        raise SettingsError(f"resume={folder}: goes on with one run; a sweep goes on with resume_sweep=FOLDER")
    given = [argument for argument in arguments if not RESUME.match(argument)]
    noted = [text for text in read_settings(folder)["overrides"] if not RESUME.match(text)]
    for text in noted:
        if may_run_code(text) and text not in given:
            raise SettingsError(
                f"resume={folder}: was started with {text}, which can run code; give it again to allow it"
            )
    place = '"' + str(folder).replace('"', '\\"') + '"'
    return [*(text for text in noted if text not in given), *given, f"resume={place}", f"hydra.run.dir={place}"]


def may_run_code(override: str) -> bool:
    """Whether a stranger's setting could run code here: a class that is not Flower's, a model's code, Hydra's."""
    targets = re.findall(r"_target_\W*([\w.]*)", override)
    return any(not target.startswith(SAFE_TARGETS) for target in targets) or bool(
        re.search(r"trust_remote_code|\$\{|^\+*hydra\b", override)
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """What `claimed` noted in settings.json.

    Raises:
        SettingsError: if that file is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        if all(isinstance(text, str) for text in content["overrides"]) and isinstance(content["settings"], dict):
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SettingsError(f"resume={folder}: not the folder of a run, or its {SETTINGS_FILE} is damaged")


@contextmanager
def claimed(folder: Path, config: RunConfig, overrides: Sequence[str]) -> Iterator[bool]:
    """`folder` for this process alone, with the settings noted; yields whether the run that is there goes on.

    Raises:
        SettingsError: if it can not be written, another process or run has it, or its run has other settings.
    """
    file = folder / ".lock"
    try:
        lock = file.open("w")
    except OSError as error:
        raise SettingsError(
            f"hydra.run.dir={folder}: can not be written ({error.strerror}); choose another folder"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(
                f"hydra.run.dir={folder}: another process is at work there; wait for its end"
            ) from error
        try:
            going_on = is_used(folder)
            if going_on:
                check_same(folder, config)
            content = {"overrides": [text for text in overrides if not RESUME.match(text)], "settings": asdict(config)}
            write_json(folder / SETTINGS_FILE, (read_settings(folder) if going_on else {}) | content)
            (folder / ERROR_FILE).unlink(missing_ok=True)
            yield going_on
        finally:
            file.unlink(missing_ok=True)


def is_used(folder: Path) -> bool:
    return any(folder.glob("peft_*")) or any((folder / name).exists() for name in (SETTINGS_FILE, METRICS_FILE))


def check_same(folder: Path, config: RunConfig) -> None:
    """Raise SettingsError if the run in `folder` should not go on, or had settings that give other results."""
    if not (config.resume or config.resume_sweep):
        raise SettingsError(
            f"hydra.run.dir={folder}: holds the results of another run; choose another folder, or resume={folder}"
        )
    now, before = json.loads(json.dumps(asdict(config))), read_settings(folder)["settings"]
    for key, (old, new) in differences(before, now).items():
        if not any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE):
            raise SettingsError(
                f"{key}={new}: the run in {folder} has {key}={old}; to go on with it, only these may change: "
                f"{', '.join(MAY_CHANGE[3:])}"
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = (old, new)
    return found


def check_data(folder: Path, facts: Mapping[str, Any]) -> None:
    """Note what tells data apart; raise SettingsError if the run in `folder` was started with other data."""
    content = read_settings(folder)
    if content.get("data", facts) != facts:
        raise SettingsError(
            f"dataset.name={content['settings']['dataset']['name']}: the run in {folder} was started with other rows "
            f"({content['data']['rows']} then, {facts['rows']} now); put them back to go on with it"
        )
    write_json(folder / SETTINGS_FILE, content | {"data": dict(facts)})


def command_to_go_on(folder: Path, sweep: Path | None = None) -> str:
    """What to type to go on with the run in `folder`, or with its sweep; empty if nothing was kept."""
    if sweep and (sweep / "multirun.yaml").exists():
        return f"python main.py resume_sweep={shlex.quote(str(sweep))}"
    if rounds_in(folder) and not (folder / RESULTS_FILE).exists():
        return f"python main.py resume={shlex.quote(str(folder))}"
    return ""
