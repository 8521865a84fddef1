"""From a command line to checked settings: Hydra's overrides in, a `RunConfig` or one clear line out."""

import re
from collections.abc import Sequence
from dataclasses import fields

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from settings.schema import (
    CONFIG_FOLDER,
    PASSED_ON,
    RunConfig,
    SamplingConfig,
    SettingsError,
    as_baseline,
    check_ranges,
    check_together,
    setting_names,
    suggest,
)

ALIASES = {"fraction_fit.fraction_fit": "strategy.fraction_fit"}

ConfigStore.instance().store(name="schema", node=RunConfig)


def canonical(overrides: Sequence[str]) -> list[str]:
    """Overrides with documented other spellings of a key replaced by the key."""
    pattern = re.compile(r"^\+{0,2}(" + "|".join(map(re.escape, ALIASES)) + ")=")
    return [pattern.sub(lambda found: ALIASES[found[1]] + "=", override) for override in overrides]


def compose(overrides: Sequence[str] = (), name: str = "config") -> RunConfig:
    """The checked settings that the command line `python main.py OVERRIDES` stands for.

    Args:
        name: the file of conf/ to start from: `config`, or `deployment` for a SuperLink.

    Raises:
        SettingsError: with one line, for unknown keys, wrong types and values out of range.
    """
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        try:
            return checked(hydra.compose(name, overrides=canonical(overrides)))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(one_line(error)) from error


def checked(cfg: DictConfig) -> RunConfig:
    """`cfg` as a `RunConfig` whose values are all in range."""
    check_known(cfg)
    config: RunConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    try:
        own = {f.name: config.strategy[f.name] for f in fields(SamplingConfig)}
        typed = OmegaConf.merge(OmegaConf.structured(SamplingConfig), own)
    except OmegaConfBaseException as error:
        raise SettingsError("strategy." + one_line(error)) from error
    config.strategy |= OmegaConf.to_container(typed)  # type: ignore[arg-type]
    check_ranges(config)
    check_ranges(config.sampling, "strategy.")
    check_together(config)
    return as_baseline(config)


def check_known(cfg: DictConfig) -> None:
    """Raise SettingsError for keys that `+KEY=VALUE` added beside the schema, and for sections set to null."""
    names = setting_names()
    sections = {name.rpartition(".")[0] for name in names} | {"strategy"} | set(PASSED_ON)
    for section in sorted(sections):
        part = OmegaConf.select(cfg, section) if section else cfg
        if not isinstance(part, DictConfig):
            raise SettingsError(
                f"{section}={part}: holds several settings; set them one by one, as {section}.KEY=VALUE"
            )
        for key in part if section not in PASSED_ON else ():
            name = ".".join(filter(None, (section, str(key))))
            if name not in names:
                raise SettingsError(f"{name}: there is no such setting{suggest(name, names)}")


REWORDED = {  # what Hydra and OmegaConf say -> what helps
    r"Value '(.*)' of type .* could not be converted to Integer": r"{key}=\1: use a whole number",
    r"Value '(.*)' of type .* could not be converted to Float": r"{key}=\1: use a number",
    r"Value '(.*)' is not a valid bool.*": r"{key}=\1: use true or false",
    r".*is not Optional.*|Incompatible value 'None' for field.*": r"{key}=null: needs a value",
    r".*Could not find '(.*)/(.*?)' Available options in '.*?': (.*?) Config search path.*": r"\1=\2: use one of: \3",
    r"Error parsing override '(.*?)' (.*?) See http.*": r"\1: is not KEY=VALUE (\2)",
    r"Config group override must be a string.*": r"a group of settings cannot be null: name one of its files",
    r"(no viable alternative at input '.*') See http.*": r"the command line cannot be parsed: \1",
}


def one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's messages as one line: key and value first, then what is allowed."""
    if isinstance(error, SettingsError):
        return str(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    text = " ".join(str(getattr(cause, "msg", None) or cause).split())
    text = re.sub(r" (full_key|object_type|reference_type)[:=] ?\S*", "", text)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return f"{key}: there is no such setting{suggest(str(key), setting_names())}"
    for pattern, words in REWORDED.items():
        if found := re.fullmatch(pattern, text):
            return re.sub(r" _\w+", "", found.expand(words).replace("{key}", str(key)))
    return text if key is None or text.startswith(str(key)) else f"{key}: {text}"
