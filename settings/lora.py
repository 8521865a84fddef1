"""`model.lora`: the fields of `peft.LoraConfig` that can be trained here, with their types and ranges."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from settings.schema import SettingsError

INSTEAD = {  # of fields that the trainer, or adapters without a base model, cannot do
    "trainable_token_indices": "train the embeddings whole: model.lora.modules_to_save=[embed_tokens]",
    "ensure_weight_tying": "name both layers in model.lora.modules_to_save",
    "alora_invocation_tokens": "such an adapter only works behind tokens that no prompt here has",
}
NAMES, WHOLE = "a list of module names, or null", "a whole number of at least 1"


def setting(what: str, **rules: Any) -> Any:
    """A field that may be left out; `what` says what is allowed."""
    return Field(default=None, description=what, **rules)


class LoraSettings(BaseModel):
    """Values that `check_lora` lets through. Their meanings are PEFT's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    r: int = setting(WHOLE, ge=1)
    lora_alpha: int = setting(WHOLE, ge=1)
    lora_dropout: float = setting("a number of at least 0 and below 1", ge=0, lt=1)
    target_modules: str | list[str] | None = setting("a list of module names, all-linear, or null")
    exclude_modules: str | list[str] | None = setting("a list of module names, a regular expression, or null")
    modules_to_save: list[str] | None = setting(NAMES)
    target_parameters: list[str] | None = setting("a list of parameter names, or null")
    bias: Literal["none", "all", "lora_only"] = setting("one of none, all, lora_only")
    init_lora_weights: Literal[True, "gaussian"] = setting("one of True, gaussian")
    use_dora: bool = setting("true or false")
    use_rslora: bool = setting("true or false")
    lora_bias: bool = setting("true or false")
    fan_in_fan_out: bool = setting("true or false")
    layers_to_transform: int | list[int] | None = setting("a list of layer numbers, or null")
    layers_pattern: str | list[str] | None = setting(NAMES)
    rank_pattern: dict[str, PositiveInt] | None = setting("module names with whole numbers of at least 1")
    alpha_pattern: dict[str, PositiveInt] | None = setting("module names with whole numbers of at least 1")


def check_lora(given: Mapping[str, Any]) -> None:
    """Raise SettingsError for the first of the `given` fields that is of another type, out of range, or not trained."""
    for key, value in given.items():
        if key not in LoraSettings.model_fields and value:  # what is off has no effect
            instead = INSTEAD.get(key, f"use one of {', '.join(LoraSettings.model_fields)}")
            raise SettingsError(f"model.lora.{key}={value}: cannot be trained here; {instead}")
    try:
        LoraSettings(**{key: value for key, value in given.items() if key in LoraSettings.model_fields})
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise SettingsError(
            f"model.lora.{key}={given[key]}: use {LoraSettings.model_fields[key].description}"
        ) from error
