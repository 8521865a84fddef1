"""From a command line to checked settings: Hydra's overrides in, a `RunConfig` or one clear line out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from settings import schema
from settings.overrides import canonical, how_to_quote
from settings.resume import flat, noted_in, with_noted
from settings.schema import CONFIG_FOLDER, RunConfig, SettingsError

open_sections = OmegaConf.create({})  # in which keys may be set that conf/ does not list, without a plus sign
for section in schema.PASSED_ON:
    OmegaConf.update(open_sections, section, OmegaConf.create({}, flags={"struct": False}))
ConfigStore.instance().store(name="schema", node=open_sections)


def compose(overrides: Sequence[str] = (), name: str = "config") -> RunConfig:
    """The checked settings that the command line `python main.py OVERRIDES` stands for, or SettingsError with one line.

    The file of conf/ to start from is `name`: `config`, or `deployment` for a SuperLink.
    """
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        try:
            given = canonical(overrides)
            return checked(hydra.compose(name, overrides=given), given)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise SettingsError(one_line(error)) from error


def checked(cfg: DictConfig, overrides: Sequence[str] = (), folder: Path | None = None) -> RunConfig:
    """`cfg` as a `RunConfig` that keeps all rules; if it resumes a run, with the settings that are noted there.

    `overrides` are all that can be changed of a run that is resumed. By default its `folder` is the one in `resume`.
    """
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    noted = noted_in(folder, values)
    if noted is None:
        return schema.as_baseline(typed(values))
    return typed(with_noted(noted, values, overrides))  # as they were when the run began, a baseline's included


def typed(values: Mapping[str, Any]) -> RunConfig:
    config: RunConfig = schema.made(RunConfig, values)
    if missing := [key for key, value in flat(asdict(config)) if value == schema.MISSING]:
        raise SettingsError(f"{missing[0]}: needs a value")
    own = {entry.name: config.strategy.get(entry.name) for entry in fields(schema.SamplingConfig)}
    config.strategy |= asdict(schema.made(schema.SamplingConfig, own, "strategy"))
    schema.check_together(config)
    return config


TEXT = "use text; where it holds brackets, commas or the like, in quotes: '{key}=\"...\"'"
REWORDED = {  # what Hydra and OmegaConf say -> what helps
    r"Cannot convert '.*' to string: '(.*)'": r"{key}=\1: " + TEXT,
    r"Value '(.*)' of type .* could not be converted to Integer": r"{key}=\1: use a whole number",
    r"Value '(.*)' is not a valid bool.*": r"{key}=\1: use true or false",
    r".*Could not find '(.*)/(.*?)' Available options in '.*?': (.*?) Config search path.*": r"\1=\2: use one of: \3",
    r"Config group override must be a string.*": r"a group of settings cannot be null: name one of its files",
}


def one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages as one line: key and value first, then what is allowed."""
    reason: BaseException | None = error
    while reason and not isinstance(reason, SettingsError):
        reason = reason.__cause__ or reason.__context__
    if reason:
        return str(reason)
    if isinstance(error, OverrideParseException):
        return how_to_quote(error.override)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    text = " ".join(str(getattr(cause, "msg", None) or cause).split())
    text = re.sub(r" (full_key|object_type|reference_type)[:=] ?\S*", "", text)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return f"{key}: there is no such setting{schema.suggest(str(key), schema.setting_names())}"
    for pattern, words in REWORDED.items():
        if found := re.fullmatch(pattern, text):
            return re.sub(r" _\w+", "", found.expand(words).replace("{key}", str(key)))
    return text if key is None or text.startswith(str(key)) else f"{key}: {text}"
