"""Resume: the settings that a run or a sweep noted, and what is given now laid over them.

A run folder may be a stranger's. What it notes is only ever read as values: no command line of another person is run
again, no interpolation is resolved, and a value that reaches beyond the run has to be given again by the user.
docs/design.md follows a resume through all modules.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf

from settings.overrides import parsed, to_type, written
from settings.schema import CONFIG_FOLDER, SettingsError

SETTINGS_FILE, BEST_LINK = "settings.json", "best"  # of a run folder
RESUME = re.compile(r"\+{0,2}resume(?:_sweep)?=")
MAY_CHANGE = (  # settings that a resumed run may change: how it is done, up to rounding and to who answers in time
    "resume", "resume_sweep", "dry_run", "tracker", "ray", "client_resources", "model.cache_folder",
    "train.micro_batch_size", "train.keep_checkpoints", "train.save_every_round", "train.early_stop_rounds",
    "train.training_arguments.gradient_checkpointing", "strategy.round_timeout_s", "strategy.min_replies",
    "strategy.round_retries", "strategy.max_bytes", "strategy.final_wait_s",
)  # fmt: skip
FLOWERS = re.compile(r"(flwr\.serverapp\.strategy|flwr_datasets\.partitioner)\.[A-Z]\w*")
ONLY_THESE = f"only these may change when it is resumed: {', '.join(MAY_CHANGE[3:])}"
ELSEWHERE = "which can run code, call an address or write elsewhere; give it again to allow it"


def covers(names: Sequence[str], key: str) -> bool:
    """Whether `key` is one of the dotted `names`, or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


# --- a run ----------------------------------------------------------------------------------------


def noted_in(folder: Path | None, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the run noted that `values` resume, in `folder` or where `resume` says; None if nothing is noted there."""
    named = Path(str(values["resume"])) if values.get("resume") else None
    if folder and named and folder.resolve() != named.resolve():
        raise SettingsError(f"hydra.run.dir={folder}: the run stays in resume={named}; leave it out")
    place = (folder or named) if named or values.get("resume_sweep") else None
    return read_settings(place) if place and os.path.isfile(place / SETTINGS_FILE) else None


def with_noted(noted: Mapping[str, Any], values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of a run that noted `noted`, with those of `values` that are given now among `overrides`.

    What is noted alike need not be given, and changes nothing; what the run did not know has the value of `values`.
    Raises SettingsError if a group is given, or a noted value reaches beyond the run and is not given again.
    """
    noted_settings, known = noted["settings"], noted["overrides"]
    unsafe, given = dict(reaching(noted_settings)), []
    for text in overrides:
        override = parsed(text)
        key = override.key_or_group
        if text in known and not any(covers([key], name) for name in unsafe):
            continue
        if override.is_delete() or (CONFIG_FOLDER / key).is_dir():
            raise SettingsError(f"{text}: a run keeps its settings when it is resumed; {ONLY_THESE}")
        given.append(key)
    if again := [to_type(key, value) for key, value in unsafe.items() if not covers(given, key)]:
        raise SettingsError(f"resume: the run was started with {' '.join(again)}, {ELSEWHERE}")
    settings = {**values, **noted_settings}
    for section, content in noted_settings.items():
        if isinstance(content, dict) and isinstance(values.get(section), dict):
            settings[section] = {**values[section], **content}
    base, now = OmegaConf.create(settings), OmegaConf.create(dict(values))
    for key in given:
        OmegaConf.update(base, key, OmegaConf.select(now, key), merge=False, force_add=True)
    return OmegaConf.to_container(base)  # type: ignore[return-value]


def reaching(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of those settings that could run code, call an address or write elsewhere."""
    for key, value in flat(settings):
        name = key.rpartition(".")[2]
        own = key == "strategy._target_" and value == "server.strategies.Alone" and settings.get("baseline") == "alone"
        if (
            (name == "_target_" and not FLOWERS.fullmatch(str(value)) and not own)
            or (name == "trust_remote_code" and value is not False)
            or (covers(("ray", "model.cache_folder"), key) and value is not None)
            or (key == "tracker" and value not in (None, "tensorboard"))
            or (isinstance(value, str) and "${" in value)
        ):
            yield key, value


def flat(value: Any, key: str = "", *, lists: bool = True) -> Iterator[tuple[str, Any]]:
    """Dotted keys of all that is inside `value`, with what stands there; by default what is inside of lists too."""
    if lists and isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flat(inner, f"{key}.{name}".lstrip("."), lists=lists)
    else:
        yield key, value


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both."""
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, old, new


def read_settings(folder: Path) -> dict[str, Any]:
    """What `claimed` noted. Raises SettingsError if that is missing or damaged, or the folder holds links."""
    if not folder.is_dir():
        raise SettingsError(f"resume={folder}: there is no such folder")
    if any((folder / name).exists() for name in ("multirun.yaml", "adapter_config.json")):
        raise SettingsError(f"resume={folder}: use resume_sweep= for a sweep; for a checkpoint, name its run folder")
    check_no_links("resume", folder)
    try:
        content: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        if all(isinstance(text, str) for text in content["overrides"]) and isinstance(content["settings"], dict):
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SettingsError(f"resume={folder}: not the folder of a run, or its {SETTINGS_FILE} is damaged")


def check_no_links(key: str, folder: Path) -> None:
    """Raise SettingsError if something in `folder` is a link, but for those of run folders to their best checkpoint."""
    for path in folder.rglob("*"):
        best = path.name == BEST_LINK and path.is_symlink() and re.fullmatch(r"peft_[0-9]+", os.readlink(path))
        if path.is_symlink() and not best:
            raise SettingsError(f"{key}={folder}: holds links to other places; a run folder has none")


# --- a sweep --------------------------------------------------------------------------------------


def resumed_sweep(arguments: Sequence[str]) -> list[str]:
    """The command line that `resume_sweep=FOLDER` stands for: the sweep's own in its own folder, and what may change.

    Raises SettingsError if there is no sweep in the folder, or it had other settings than those given beside.
    """
    mark = "resume_sweep="
    place = next((parsed(text).value() for text in reversed(arguments) if text.lstrip("+").startswith(mark)), None)
    if not place:
        return list(arguments)
    folder = Path(str(place))
    given = [text for text in arguments if not RESUME.match(text) and text not in ("--multirun", "-m")]
    try:
        overrides = yaml.safe_load((folder / "multirun.yaml").read_text(encoding="utf-8"))["hydra"]["overrides"]
        noted = [*map(str, overrides["task"]), *map(str, overrides["hydra"])]
        noted = [text for text in noted if not re.match(r"hydra\.(sweep\.dir|mode)=", text) and not RESUME.match(text)]
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        raise SettingsError(f"{mark}{folder}: not the folder of a grid sweep (its multirun.yaml is missing)") from error
    check_no_links("resume_sweep", folder)
    changes = [text for text in given if text not in noted]
    for text in changes:
        if text.startswith("-") or not covers(MAY_CHANGE, parsed(text).key_or_group):
            raise SettingsError(
                f"{mark}{folder}: was started with {shlex.join(noted)}; repeat that, or give nothing: {ONLY_THESE}"
            )
    if again := [text for text in noted if text not in given and reaches_out(text)]:
        raise SettingsError(f"{mark}{folder}: was started with {shlex.join(again)}, {ELSEWHERE}")
    here = written(str(folder))
    return ["--multirun", *noted, *changes, f"{mark}{here}", f"hydra.sweep.dir={here}"]


def reaches_out(text: str) -> bool:
    """Whether an override of a sweep that may be a stranger's could do more than set values within the run.

    A launcher or sweeper out of those that are installed here could not, nor could numbers for them.
    """
    try:
        override = parsed(text)
        options = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
        values = [parsed(f"key={option}").value() for option in options] or [override.value()]
    except (HydraException, ValueError):
        return True
    key = override.key_or_group
    if re.fullmatch(r"hydra/(launcher|sweeper)", key):
        return not all(str(value).isidentifier() for value in values)
    if re.fullmatch(r"hydra\.(launcher|sweeper)\.[a-z]\w*", key):
        return not all(isinstance(value, int | float | None) for value in values)
    if override.is_delete() or override.package or key.startswith("hydra") or "$" in text or ".." in text:
        return True
    return any(reaches for value in values for reaches in reaching({key: value}))
