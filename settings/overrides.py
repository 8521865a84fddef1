"""Hydra's grammar of the command line: overrides read, and written so that Hydra reads the same values back."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

ALIAS = re.compile(r"^\+{0,2}fraction_fit\.fraction_fit=")
PATHS = ("dataset.name", "dataset.eval_name", "dataset.template", "model.name")


def canonical(overrides: Sequence[str]) -> list[str]:
    """Overrides with the documented other spelling of a key replaced by the key, and paths that are there in quotes."""
    return [ALIAS.sub("strategy.fraction_fit=", in_quotes(override)) for override in overrides]


def in_quotes(override: str) -> str:
    """KEY=PATH with the path in quotes, if something is there that Hydra would not take for text as it stands.

    What begins with the home folder is a path, whether it is there or not.
    """
    key, _, value = override.partition("=")
    is_path = value.startswith("~/") or os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111
    if key.lstrip("+") in PATHS and is_path and not reads_back(value):
        return f"{key}={quoted(value)}"
    return override


def parsed(override: str) -> Override:
    """What Hydra reads in KEY=VALUE; raises its OverrideParseException."""
    return OverridesParser.create().parse_override(override)


def written(value: Any) -> str:
    """`value` as it has to be written after KEY= for Hydra to read it back."""
    if isinstance(value, str):
        return value if reads_back(value) else quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(written, value)) + "]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def reads_back(text: str) -> bool:
    """Whether Hydra takes `text` for itself, and not for a number, a list, a choice of a sweep or another value."""
    try:
        override = parsed(f"key={text}")
        return not override.is_sweep_override() and override.value() == text != "" and not re.search(r"\\|\${", text)
    except HydraException:
        return False


def quoted(text: str) -> str:
    """`text` in quotes that Hydra takes off; a backslash means itself but before a quote and before `${`."""
    escaped = re.sub(r'(\\*)("|\$\{)', r"\1\1\\\2", text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def to_type(key: str, value: Any) -> str:
    """KEY=VALUE as it has to be typed in a shell."""
    return shlex.quote(f"{key}={written(value)}")


def how_to_quote(override: str) -> str:
    """What to say of an override that Hydra's grammar refuses."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: is not KEY=VALUE; a value with blanks needs quotes, as in 'KEY=\"a b\"'"
    if not re.fullmatch(r"[+~]{0,2}[\w./@:-]+", key, re.ASCII):
        return f"{key}: there is no such setting"
    return (
        f"{override}: Hydra cannot read this; a value that is text needs quotes, for the shell and for Hydra: "
        + shlex.quote(f"{key}={quoted(value)}")
    )
