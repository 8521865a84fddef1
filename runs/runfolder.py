"""A run folder: one process at a time, the settings that it was started with, and how it is resumed."""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from itertools import starmap
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from settings.overrides import to_type, written
from settings.resume import MAY_CHANGE, ONLY_THESE, RESUME, SETTINGS_FILE, covers, differences, reaching, read_settings
from settings.schema import RunConfig, SettingsError
from utils import DIGESTS_FILE, torn_files, write_json, write_whole

METRICS_FILE, RESULTS_FILE, ERROR_FILE = "metrics.jsonl", "results.json", "error.txt"


def folder_of(run_folder: Path, round_number: int) -> Path:
    return run_folder / f"peft_{round_number}"


def rounds_in(run_folder: Path) -> list[int]:
    """Rounds that have a checkpoint, whole or damaged, newest first."""
    found = (re.fullmatch(r"peft_([0-9]+)", folder.name) for folder in run_folder.glob("peft_*") if folder.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def new_folder(below: Path) -> Path:
    """A run folder named by the time, or by the next second if another run has that one."""
    moment = datetime.now().astimezone()
    while True:
        folder = below / moment.strftime("%Y-%m-%d/%H-%M-%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            moment += timedelta(seconds=1)
        except OSError as error:
            raise unusable(folder, f"cannot be written ({error.strerror}); choose another folder") from error


def unusable(folder: Path, reason: str) -> SettingsError:
    return SettingsError(f"hydra.run.dir={folder}: {reason}")


def run_folder(resume: str | None) -> str:
    """`hydra.run.dir`: a new folder, or that of the run that is resumed, looked at before Hydra writes there."""
    if resume:
        read_settings(Path(str(resume)))
    return str(resume or new_folder(Path("outputs")))


def sweep_folder(resume: str | None) -> str:
    """`hydra.sweep.dir`: a new folder."""
    if resume:
        raise SettingsError(f"resume={resume}: resumes one run; use resume_sweep=FOLDER for a sweep")
    return str(new_folder(Path("multirun")))


for resolver in (run_folder, sweep_folder):  # of conf/config.yaml; here, because a launcher's processes import this
    OmegaConf.register_new_resolver(resolver.__name__, resolver, use_cache=True, replace=True)


@contextmanager
def claimed(folder: Path, config: RunConfig, overrides: Sequence[str]) -> Iterator[bool]:
    """`folder` for this process alone, with the settings noted; yields whether the run that is there is resumed.

    Raises SettingsError if it cannot be written, another process or run has it, or its run has other settings.
    """
    with ExitStack() as stack:
        try:  # the file stays: others may hold it
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise unusable(folder, "another process is at work there; wait for its end") from error
        except OSError as error:
            raise unusable(folder, f"cannot be written ({error.strerror}); choose another folder") from error
        content: dict[str, Any] = {
            "overrides": [text for text in overrides if not RESUME.match(text)],
            "settings": asdict(config),
        }
        wanted = config.resume or config.resume_sweep
        if resumes := has_rounds(folder) or bool(wanted and (folder / SETTINGS_FILE).exists()):
            changed, before = check_same(folder, config), read_settings(folder)
            changes = [f"{key}={written(value)}" for key, value in changed.items()]
            content |= {"overrides": [*before["overrides"], *changes], "data": before.get("data")}
        elif config.resume:
            raise SettingsError(f"resume={folder}: no run is there")
        write_json(folder / SETTINGS_FILE, content)
        (folder / ERROR_FILE).unlink(missing_ok=True)
        try:
            yield resumes
        except Exception as error:
            with suppress(OSError):
                write_whole(folder / ERROR_FILE, f"{error or repr(error)}\n")
            raise


def has_rounds(folder: Path) -> bool:
    """Whether a run has left results in `folder`: one that was refused before its first round has not."""
    return any(folder.glob("peft_*")) or (folder / METRICS_FILE).exists()


def check_same(folder: Path, config: RunConfig) -> dict[str, Any]:
    """What `config` changes of the run in `folder`. Raises SettingsError if that is not allowed, or not asked for."""
    if not (config.resume or config.resume_sweep):
        raise unusable(folder, f"holds the results of another run; choose another folder, or resume={folder}")
    changed = changed_settings(folder, config)
    for key, (old, new) in changed.items():
        if not covers(MAY_CHANGE, key):
            raise SettingsError(f"{key}={new}: the run in {folder} has {key}={old}; {ONLY_THESE}")
    return {key: new for key, (_, new) in changed.items() if not covers(MAY_CHANGE[:3], key)}


def has_more_room(folder: Path, config: RunConfig, results: Mapping[str, Any]) -> bool:
    """Whether the complete run in `folder` was ended early by a setting that is another one in `config`."""
    return str(results.get("ended")).partition("=")[0] in changed_settings(folder, config)


def changed_settings(folder: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the run in `folder` that `config` has otherwise: before and now."""
    now = json.loads(json.dumps(asdict(config)))
    return {key: (old, new) for key, old, new in differences(read_settings(folder)["settings"], now)}


def check_data(folder: Path, facts: Mapping[str, Any]) -> None:
    """Note a fingerprint of the data; raise SettingsError if the run in `folder` was started with other data."""
    content = read_settings(folder)
    both = [content.get("data") or facts, facts]
    for key, found in (("name", both), ("eval_name", [facts.get("held_out") or {} for facts in both])):
        then, now = ({name: fact for name, fact in facts.items() if name != "held_out"} for facts in found)
        if then != now:
            raise SettingsError(
                f"dataset.{key}={content['settings']['dataset'][key]}: the run in {folder} was started with other rows "
                f"({then.get('rows')} then, {now.get('rows')} now); put them back to resume it"
            )
    write_json(folder / SETTINGS_FILE, content | {"data": dict(facts)})


def command_to_resume(folder: Path, sweep: Path | None = None) -> str:
    """What to type to resume the run in `folder`, or its sweep; empty if no round was kept."""
    if sweep and (sweep / "multirun.yaml").exists():
        return f"python main.py {to_type('resume_sweep', str(sweep))}"
    if rounds_in(folder) and not (folder / RESULTS_FILE).exists():
        values = [("resume", str(folder)), *reaching(read_settings(folder)["settings"])]
        return " ".join(["python main.py", *starmap(to_type, values)])
    return ""


LOOK = "a run folder holds peft_<round>/ folders, each with adapter_config.json and adapter_model.safetensors"


def find_checkpoint(name: str) -> Path:
    """The adapter folder that `--peft-path` means: itself, or the last checkpoint of a run folder.

    Raises SettingsError if there is none, or it says itself that it is damaged.
    """
    folder = Path(os.path.expanduser(name))  # noqa: PTH111  Path's own raises for the home of nobody
    if os.path.isfile(folder):
        raise SettingsError(f"--peft-path={name}: is a file; name the folder in which the adapter lies")
    if not os.path.isdir(folder):
        raise SettingsError(f"--peft-path={name}: no such folder; {LOOK}")
    if not os.path.isfile(folder / "adapter_config.json"):
        if not (rounds := rounds_in(folder)):
            raise SettingsError(f"--peft-path={name}: no adapter here; {LOOK}")
        folder = folder_of(folder, rounds[0])
    if (folder / DIGESTS_FILE).exists() and (torn := torn_files(folder)):
        raise SettingsError(f"--peft-path={folder}: damaged ({', '.join(torn)}); name another checkpoint")
    return folder
