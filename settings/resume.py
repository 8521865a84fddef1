"""The command line that `resume=FOLDER` and `resume_sweep=FOLDER` stand for: the one of the run or sweep there."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from settings.schema import SettingsError

SETTINGS_FILE, BEST_LINK = "settings.json", "best"  # of a run folder
RESUME = re.compile(r"\+{0,2}resume(?:_sweep)?=")
# what a stranger's run folder may say: KEY=VALUE of this suite, but no address, no place to write, no code
HARMLESS = re.compile(
    r"\+{0,2}(?!hydra\b|ray\b|tracker=(?!tensorboard$|null$)|model\.cache_folder=|model\.lora\.megatron)[a-z][\w./]*=[^$]*"
)
FLOWERS = re.compile(
    r"\+{0,2}(strategy|dataset\.partitioner)\._target_=(flwr\.serverapp\.strategy|flwr_datasets\.partitioner)\.[A-Z]\w*"
)
HARMLESS_ENGINE = re.compile(r"hydra/(launcher|sweeper)=\w+|hydra\.(launcher|sweeper)\.(?!_)\w+=[\w.]+")


def resumed_run(arguments: Sequence[str]) -> list[str]:
    """The command line that `resume=FOLDER` stands for: the run's own, in its own folder, and what is given beside.

    Raises:
        SettingsError: if there is no run in the folder, or its settings could run code and are not given again.
    """
    folder = folder_given("resume", arguments)
    if folder is None:
        return list(arguments)
    given = [argument for argument in arguments if not RESUME.match(argument)]
    for argument in given:
        if argument in ("--multirun", "-m"):
            raise SettingsError(f"resume={folder}: resumes one run; use resume_sweep=FOLDER for a sweep")
        if argument.startswith("hydra.run.dir="):
            raise SettingsError(f"{argument}: the run stays in resume={folder}; leave it out")
    noted = [text for text in read_settings(folder)["overrides"] if not RESUME.match(text)]
    for text in noted:
        if must_be_said(text) and text not in given:
            raise SettingsError(
                f"resume={folder}: was started with {text}, which can run code, call an address or write "
                "elsewhere; give it again to allow it"
            )
    place = f'"{folder}"'
    return [*(text for text in noted if text not in given), *given, f"resume={place}", f"hydra.run.dir={place}"]


def folder_given(key: str, arguments: Sequence[str]) -> Path | None:
    """The folder that KEY=FOLDER names among `arguments`; None for none.

    Raises:
        SettingsError: if its name would mean something else to Hydra.
    """
    values = [text.partition("=")[2] for text in arguments if re.match(rf"\+{{0,2}}{key}=", text)]
    value = values[-1] if values else "null"
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    if value in ("null", ""):
        return None
    if re.search(r"[\"'\\$]", value):
        raise SettingsError(
            f"{key}={value}: rename the folder: quotes, backslashes and dollar signs mean something else"
        )
    return Path(value)


def must_be_said(override: str) -> bool:
    """Whether a setting from a folder that may be a stranger's must be given again: it is no plain KEY=VALUE of this
    suite, names a class that is not Flower's, or could otherwise run code, call an address or write elsewhere.
    """
    if "_target_" in override:
        return not FLOWERS.fullmatch(override)
    return not HARMLESS.fullmatch(override) or bool(re.search("trust_remote_code(?!=false)", override))


def resumed_sweep(arguments: Sequence[str]) -> list[str]:
    """The command line that `resume_sweep=FOLDER` stands for: the sweep's own, in its own folder.

    Raises:
        SettingsError: if there is no sweep in the folder, or it had other settings than those given beside.
    """
    folder, mark = folder_given("resume_sweep", arguments), "resume_sweep="
    if folder is None:
        return [argument for argument in arguments if argument != f"{mark}null"]
    try:
        overrides = OmegaConf.load(folder / "multirun.yaml").hydra.overrides
        own = [item for item in overrides.task if not RESUME.match(item)]
        engine = [item for item in overrides.hydra if not item.startswith(("hydra.sweep.dir=", "hydra.mode="))]
    except (OSError, YAMLError, OmegaConfBaseException, TypeError) as error:
        raise SettingsError(f"{mark}{folder}: not the folder of a grid sweep (its multirun.yaml is missing)") from error
    given = [item for item in arguments if not item.startswith(mark) and item not in ("--multirun", "-m")]
    if given and sorted(given) != sorted([*own, *engine]):
        raise SettingsError(
            f"{mark}{folder}: was started with {' '.join([*own, *engine])}; repeat that, or give nothing"
        )
    for item in [*own, *(text for text in engine if not HARMLESS_ENGINE.fullmatch(text))]:
        if item not in given and must_be_said(item):
            raise SettingsError(
                f"{mark}{folder}: was started with {item}, which can run code, call an address or write "
                "elsewhere; repeat the whole command"
            )
    return ["--multirun", *own, *engine, f'{mark}"{folder}"', f'hydra.sweep.dir="{folder}"']


def read_settings(folder: Path) -> dict[str, Any]:
    """What `claimed` noted in settings.json.

    Raises:
        SettingsError: if that file is missing or damaged.
    """
    if not folder.is_dir():
        raise SettingsError(f"resume={folder}: there is no such folder")
    if any((folder / name).exists() for name in ("multirun.yaml", "adapter_config.json")):
        raise SettingsError(f"resume={folder}: use resume_sweep= for a sweep; for a checkpoint, name its run folder")
    if any(path.is_symlink() and not is_best(path) for path in folder.rglob("*")):
        raise SettingsError(f"resume={folder}: holds links to other places; a run folder has none")
    try:
        content: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        if all(isinstance(text, str) for text in content["overrides"]) and isinstance(content["settings"], dict):
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SettingsError(f"resume={folder}: not the folder of a run, or its {SETTINGS_FILE} is damaged")


def is_best(path: Path) -> bool:
    """Whether this is a run folder's link to its best checkpoint, and nothing else."""
    return path.name == BEST_LINK and bool(re.fullmatch(r"peft_[0-9]+", os.readlink(path)))
