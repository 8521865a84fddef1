"""`model.lora`: the fields of `peft.LoraConfig` that can be trained here, with their types and ranges."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from settings.schema import SettingsError, made

INSTEAD = {  # of fields that the trainer, or adapters without a base model, cannot do
    "trainable_token_indices": "train the embeddings whole: model.lora.modules_to_save=[embed_tokens]",
    "ensure_weight_tying": "name both layers in model.lora.modules_to_save",
    "alora_invocation_tokens": "such an adapter only works behind tokens that no prompt here has",
}
NAMES = "a list of module names, or null"


def setting(what: str | None = None, **rules: Any) -> Any:
    """A field that may be left out; `what` says what is allowed, where type and range do not."""
    return Field(default=None, description=what, **rules)


@dataclass(kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class LoraSettings:
    """Values that `check_lora` lets through. Their meanings are PEFT's."""

    r: int = setting(ge=1)
    lora_alpha: int = setting(ge=1)
    lora_dropout: float = setting(ge=0, lt=1)
    target_modules: str | list[str] | None = setting("a list of module names, all-linear, or null")
    exclude_modules: str | list[str] | None = setting("a list of module names, a regular expression, or null")
    modules_to_save: list[str] | None = setting(NAMES)
    target_parameters: list[str] | None = setting("a list of parameter names, or null")
    bias: Literal["none", "all", "lora_only"] = setting()
    init_lora_weights: Literal[True, "gaussian"] = setting("one of True, gaussian")
    use_dora: bool = setting()
    use_rslora: bool = setting()
    lora_bias: bool = setting()
    fan_in_fan_out: bool = setting()
    layers_to_transform: int | list[int] | None = setting("a list of layer numbers, or null")
    layers_pattern: str | list[str] | None = setting(NAMES)
    rank_pattern: dict[str, PositiveInt] | None = setting("module names with whole numbers of at least 1")
    alpha_pattern: dict[str, PositiveInt] | None = setting("module names with whole numbers of at least 1")


def check_lora(given: Mapping[str, Any]) -> None:
    """Raise SettingsError for the first of the `given` fields that is of another type, out of range, or not trained."""
    known = LoraSettings.__dataclass_fields__
    for key, value in given.items():
        if key not in known and value:  # what is off has no effect
            instead = INSTEAD.get(key, f"use one of {', '.join(known)}")
            raise SettingsError(f"model.lora.{key}={value}: cannot be trained here; {instead}")
    made(LoraSettings, {key: value for key, value in given.items() if key in known}, "model.lora")
