"""A node's policy: what its owner lets a server ask of it, whatever the server or a stranger sends.

Every default is written in conf/policy.yaml, with what it means.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic.dataclasses import dataclass

from settings import schema
from settings.lora import check_lora
from settings.resume import flat
from settings.schema import CONFIG_FOLDER, STRICT, Number, RunConfig, SettingsError, Whole, made, public, required

WIDE = ("modules_to_save", "target_parameters", "lora_bias")  # fields of model.lora that train more than low ranks


@dataclass(kw_only=True, config=STRICT)
class Policy:
    pinned: dict[str, Any] = required(description="KEY: VALUE, settings that a run must have")
    min_step_rows: Whole = required(ge=1)
    min_held_out_rows: Whole = required(ge=1)
    max_steps: Whole = required(ge=1)
    max_seconds: Number = required(gt=0)
    max_answers: Whole = required(ge=0)
    max_new_tokens: Whole = required(ge=1)
    max_seq_length: Whole = required(ge=16)
    max_learning_rate: Number = required(gt=0)
    max_rank: Whole = required(ge=1)
    max_message_bytes: Number = required(gt=0)
    train_embeddings: bool = required()
    target_modules: list[str] | None = required(description="a list of module names, or null")
    optimizers: list[str] = required(description="a list of names")
    training_arguments: list[str] = required(description="a list of fields of trl.SFTConfig")


def read_policy(path: Path | None = None) -> Policy:
    """The policy in a file that says what is not as in conf/policy.yaml. Raises SettingsError for a wrong line."""
    values = yaml.safe_load((CONFIG_FOLDER / "policy.yaml").read_text(encoding="utf-8"))
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path else {}
        if not isinstance(given, Mapping):
            raise SettingsError("use lines of KEY: VALUE, as in conf/policy.yaml")
        policy: Policy = made(Policy, values | {str(key): value for key, value in given.items()})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--policy={path}: cannot be read ({error})") from error
    except SettingsError as error:
        raise SettingsError(f"--policy={path}: {error}") from error
    return policy


def refusal(key: str, value: Any, limit: str) -> SettingsError:
    """What a node says of a setting that its policy does not allow: nothing of the node's own."""
    return public(SettingsError(f"{key}={value}: this node's policy allows {limit}"))


def check_policy(policy: Policy, config: RunConfig) -> None:
    """Raise SettingsError for the first setting of a run that goes beyond `policy`; the text may be sent."""
    check_pinned(policy, config)
    check_lora(config.model.lora)
    arguments, evaluate, lora = config.train.training_arguments, config.evaluate, config.model.lora
    steps = "train.training_arguments"
    for key in arguments:
        if key not in policy.training_arguments:
            raise refusal(f"{steps}.{key}", arguments[key], f"{', '.join(policy.training_arguments)} to be set")
    if arguments.get("optim", policy.optimizers[0]) not in policy.optimizers:
        raise refusal(f"{steps}.optim", arguments["optim"], ", ".join(policy.optimizers))
    if config.train.batch_size < policy.min_step_rows:
        raise refusal(
            f"{steps}.per_device_train_batch_size", arguments["per_device_train_batch_size"],
            f"no optimizer step of fewer than {policy.min_step_rows} rows (min_step_rows)",
        )  # fmt: skip
    limits: list[tuple[str, Any, float, str]] = [
        (f"{steps}.max_steps", arguments["max_steps"], policy.max_steps, "max_steps"),
        ("train.seq_length", config.train.seq_length, policy.max_seq_length, "max_seq_length"),
        ("train.learning_rate_max", config.train.learning_rate_max, policy.max_learning_rate, "max_learning_rate"),
        ("evaluate.answers", evaluate.answers, policy.max_answers, "max_answers"),
        ("evaluate.max_new_tokens", evaluate.max_new_tokens, policy.max_new_tokens, "max_new_tokens"),
        ("model.lora.r", lora.get("r", 0), policy.max_rank, "max_rank"),
    ]
    ranks = lora.get("rank_pattern") or {}
    limits += [(f"model.lora.rank_pattern.{name}", rank, policy.max_rank, "max_rank") for name, rank in ranks.items()]
    for key, value, most, name in limits:
        if not value <= most:
            raise refusal(key, value, f"at most {most:g} ({name})")
    if 0 < evaluate.answers < policy.min_held_out_rows:
        limit = f"none, or answers to at least {policy.min_held_out_rows} rows (min_held_out_rows)"
        raise refusal("evaluate.answers", evaluate.answers, limit)
    for key in () if policy.train_embeddings else WIDE:
        if lora.get(key):
            raise refusal(f"model.lora.{key}", lora[key], "only linear layers to be trained (train_embeddings)")


def check_pinned(policy: Policy, config: RunConfig) -> None:
    settings = dict(flat(asdict(config), lists=False))
    for key, wanted in flat(policy.pinned, lists=False):
        if key not in settings:
            raise SettingsError(f"policy: pinned: {key}: there is no such setting{schema.suggest(key, list(settings))}")
        if settings[key] != wanted and str(settings[key]) != str(wanted):
            raise refusal(key, settings[key], f"only {wanted} (pinned)")


def check_adapter(policy: Policy, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Raise SettingsError if an adapter with these `tensors`, by PEFT's names, trains a layer that is not allowed."""
    for name in tensors:
        module = name.partition(".lora_")[0]
        if not policy.train_embeddings and (".lora_" not in name or ".lora_embedding" in name):
            raise refusal("model.lora", module, "no embedding, head or whole layer to be trained (train_embeddings)")
        if policy.target_modules is not None and module.rpartition(".")[2] not in policy.target_modules:
            raise refusal("model.lora.target_modules", module, f"{', '.join(policy.target_modules)} to be trained")
