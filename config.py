"""Typed settings: what `conf/` may say, and one clear line for whatever it may not.

Every default is written in `conf/`; this schema holds types, meanings and ranges. `compose` turns
Hydra overrides into a checked `RunConfig`. It imports no model library, so it is quick.
"""

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

CONFIG_FOLDER = Path(__file__).resolve().parent / "conf"
PASSED_ON = ("model.lora", "dataset.partitioner", "train.training_arguments", "strategy")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
ALIASES = {"fraction_fit.fraction_fit": "strategy.fraction_fit"}


class SettingsError(ValueError):
    """A setting or an input that the user has to change; the message is one line that says how."""


def ranged(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Any:
    """A required number in [low, high], or in (above, high]."""
    return field(default=MISSING, metadata={"low": low, "high": high, "above": above})


def choice(*allowed: str) -> Any:
    """A required string out of `allowed`."""
    return field(default=MISSING, metadata={"allowed": allowed})


def passed_on() -> Any:
    """Keyword arguments of a library's class: any key may be set; `check_keywords` knows which exist."""
    return field(default_factory=lambda: OmegaConf.create({}, flags={"struct": False}))


@dataclass(kw_only=True)
class ModelConfig:
    name: str = MISSING
    """Hub id or local folder of the base model."""
    quantization: str = choice("4", "8", "none")
    """Bits of the frozen weights. The adapter is always float32."""
    trust_remote_code: bool = MISSING
    """Run Python code that the model's repository brings along."""
    lora: dict[str, Any] = passed_on()
    """Fields of `peft.LoraConfig`."""


@dataclass(kw_only=True)
class DatasetConfig:
    name: str = MISSING
    """Hub id, or a local JSON, JSONL, CSV or Parquet file, or a folder of them."""
    split: str = MISSING
    """Split of a Hub data set."""
    template: str = MISSING
    """A template of conf/template, a Jinja chat template's path, or `tokenizer` for the model's own."""
    holdout: float = ranged(0.0, 0.5)
    """Share of each partition that is never trained on, for evaluation on the clients."""
    partitioner: dict[str, Any] = passed_on()
    """`_target_`: a flwr_datasets partitioner; the rest are its arguments."""


@dataclass(kw_only=True)
class TrainConfig:
    learning_rate_max: float = ranged(above=0.0, high=1.0)
    """Learning rate of the first round."""
    learning_rate_min: float = ranged(0.0, 1.0)
    """Learning rate of the last round; cosine in between, constant within a round."""
    seq_length: int = ranged(16)
    """Longest row, in tokens, prompt and response together."""
    micro_batch_size: int = ranged(1)
    """Rows in one forward pass. It does not change the gradient, only memory and padding."""
    save_every_round: int = ranged(1)
    """Rounds between two checkpoints; the last round is always saved."""
    training_arguments: dict[str, Any] = passed_on()
    """Fields of `trl.SFTConfig`."""


@dataclass(kw_only=True)
class SamplingConfig:
    """The keys of `strategy` that are ours; all others go to the strategy's constructor."""

    fraction_fit: float = ranged(above=0.0, high=1.0)
    """Share of the clients that train in a round."""
    fraction_evaluate: float = ranged(0.0, 1.0)
    """Share of the clients that evaluate the new adapter on their held-out rows after a round."""
    round_timeout_s: float = ranged(above=0.0)
    """Seconds after which a round goes on without the clients that have not answered."""


@dataclass(kw_only=True)
class ClientResources:
    num_cpus: int = ranged(1)
    """CPU cores, and compute threads, of one worker."""
    num_gpus: float = ranged(0.0)
    """GPUs of one worker; 0.5 puts two workers, with a base model each, on one GPU."""


@dataclass(kw_only=True)
class RayConfig:
    address: str | None = MISSING
    """Address of a running Ray cluster (or `auto`); null starts Ray on this machine."""


@dataclass(kw_only=True)
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: dict[str, Any] = passed_on()
    """`_target_`: any Flower strategy; `SamplingConfig` and the strategy's own arguments."""
    client_resources: ClientResources = field(default_factory=ClientResources)
    ray: RayConfig = field(default_factory=RayConfig)
    num_clients: int = ranged(1)
    num_rounds: int = ranged(1)
    seed: int = ranged(0, 2**31 - 1)
    dry_run: bool = MISSING
    tracker: str | None = field(default=MISSING, metadata={"allowed": (None, *TRACKERS)})
    """Where the numbers of each round go besides metrics.jsonl, through accelerate's trackers."""
    resume_sweep: str | None = MISSING
    """Folder of an interrupted sweep: its complete jobs are not run again."""

    @property
    def sampling(self) -> SamplingConfig:
        """The part of `strategy` that says who takes part in a round."""
        return SamplingConfig(**{f.name: self.strategy[f.name] for f in fields(SamplingConfig)})

    @property
    def batch_size(self) -> int:
        """Rows of one optimizer step."""
        arguments = self.train.training_arguments
        return arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]

    @property
    def clients_per_round(self) -> int:
        """Clients that train in a round."""
        return share_of(self.num_clients, self.sampling.fraction_fit)


ConfigStore.instance().store(name="schema", node=RunConfig)


def share_of(count: int, fraction: float) -> int:
    """Flower's rounding, int(count * fraction), but safe against 0.29 * 100 = 28.999..."""
    return int(count * fraction + 1e-9)


def canonical(overrides: Sequence[str]) -> list[str]:
    """Overrides with documented other spellings of a key replaced by the key."""
    pattern = re.compile(r"^\+{0,2}(" + "|".join(map(re.escape, ALIASES)) + ")=")
    return [pattern.sub(lambda found: ALIASES[found[1]] + "=", override) for override in overrides]


def resumed(arguments: Sequence[str]) -> list[str]:
    """The command line that `resume_sweep=FOLDER` stands for: the sweep's own, in its own folder.

    Raises:
        SettingsError: if there is no sweep in the folder, or it had other settings than those given beside.
    """
    mark = "resume_sweep="
    folders = [argument[len(mark) :] for argument in arguments if argument.startswith(mark)]
    if not folders:
        return list(arguments)
    noted = Path(folders[-1]) / "multirun.yaml"
    if not noted.is_file():
        raise SettingsError(f"{mark}{folders[-1]}: not the folder of a sweep (it has no multirun.yaml)")
    overrides = OmegaConf.load(noted).hydra.overrides
    own = [item for item in overrides.task if not item.startswith(mark)]
    given = [item for item in arguments if "=" in item and not item.startswith((mark, "hydra", "-"))]
    if given and given != own:
        raise SettingsError(f"{mark}{folders[-1]}: was started with {' '.join(own)}; repeat these, or give none")
    engine = [item for item in overrides.hydra if not item.startswith(("hydra.sweep.dir=", "hydra.mode="))]
    return ["--multirun", *own, *engine, f"{mark}{folders[-1]}", f"hydra.sweep.dir={folders[-1]}"]


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
    return config


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


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Raise SettingsError for the first field, nested ones included, outside its declared range."""
    for entry in fields(settings):
        key, value, rule = prefix + entry.name, getattr(settings, entry.name), entry.metadata
        if is_dataclass(value):
            check_ranges(value, key + ".")
        elif "allowed" in rule and value not in rule["allowed"]:
            known = ", ".join("null" if allowed is None else allowed for allowed in rule["allowed"])
            raise SettingsError(f"{key}={value}: use one of {known}")
        elif "low" in rule and not in_range(value, rule):
            raise SettingsError(f"{key}={value}: use {describe_range(rule)}")


def in_range(value: float, rule: Mapping[str, float | None]) -> bool:
    low, high, above = rule["low"], rule["high"], rule["above"]
    return (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)


def describe_range(rule: Mapping[str, float | None]) -> str:
    low, high, above = rule["low"], rule["high"], rule["above"]
    start = f"a number above {above:.10g}" if above is not None else f"a number of at least {low:.10g}"
    return start + ("" if high is None else f" and at most {high:.10g}")


def check_together(config: RunConfig) -> None:
    """Rules that span several keys."""
    train, sampling = config.train, config.sampling
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"):
        value = train.training_arguments.get(key)
        if type(value) is not int or value < 1:
            raise SettingsError(f"train.training_arguments.{key}={value}: use a whole number of at least 1")
    arguments = train.training_arguments
    if arguments.get("warmup_steps") and arguments.get("lr_scheduler_type", "constant") == "constant":
        raise SettingsError(
            f"train.training_arguments.warmup_steps={arguments['warmup_steps']}: has no effect on a constant rate; "
            "set train.training_arguments.lr_scheduler_type=constant_with_warmup too"
        )
    if train.learning_rate_min > train.learning_rate_max:
        raise SettingsError(
            f"train.learning_rate_min={train.learning_rate_min}: use at most train.learning_rate_max, "
            f"which is {train.learning_rate_max}"
        )
    if config.batch_size % min(train.micro_batch_size, config.batch_size):
        raise SettingsError(
            f"train.micro_batch_size={train.micro_batch_size}: use a divisor of the {config.batch_size} rows of one "
            "step (per_device_train_batch_size x gradient_accumulation_steps)"
        )
    if not config.clients_per_round:
        raise SettingsError(
            f"strategy.fraction_fit={sampling.fraction_fit}: selects none of num_clients={config.num_clients}; "
            f"use at least {1 / config.num_clients:g}"
        )
    if sampling.fraction_evaluate and not share_of(config.num_clients, sampling.fraction_evaluate):
        raise SettingsError(
            f"strategy.fraction_evaluate={sampling.fraction_evaluate}: selects none of "
            f"num_clients={config.num_clients}; use 0, or at least {1 / config.num_clients:g}"
        )
    if sampling.fraction_evaluate and not config.dataset.holdout:
        raise SettingsError(
            f"strategy.fraction_evaluate={sampling.fraction_evaluate}: clients have no rows to evaluate on; "
            "set dataset.holdout, for example 0.05"
        )
    for key, section in (("strategy", config.strategy), ("dataset.partitioner", config.dataset.partitioner)):
        if not isinstance(section.get("_target_"), str):
            raise SettingsError(f"{key}._target_={section.get('_target_')}: use the import path of a class")


def check_keywords(key: str, given: Mapping[str, Any], target: Any, managed: Mapping[str, str] | None = None) -> None:
    """Raise SettingsError for a keyword that `target` lacks, or that another setting (`managed`) decides."""
    parameters = inspect.signature(target).parameters
    known = [name for name in parameters if name not in ("self", "args", "kwargs")]
    for name, value in given.items():
        if managed and name in managed:
            raise SettingsError(f"{key}.{name}={given[name]}: decided by this suite; {managed[name]}")
        if name not in known and name != "_target_":
            raise SettingsError(
                f"{key}.{name}={given[name]}: {target.__name__} has no such field{suggest(name, known)}"
            )
        default = parameters[name].default if name in parameters else None
        if type(default) in (int, float) and (isinstance(value, str) or value is None):
            raise SettingsError(f"{key}.{name}={value}: use a number")


def suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def setting_names(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted."""
    names = []
    for entry in fields(schema):
        if is_dataclass(entry.type):
            names += setting_names(entry.type, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        names.append(prefix + entry.name)
    return names + [f"strategy.{f.name}" for f in fields(SamplingConfig) if schema is RunConfig]


REWORDED = {  # what Hydra and OmegaConf say -> what helps
    r"Value '(.*)' of type .* could not be converted to Integer": r"{key}=\1: use a whole number",
    r"Value '(.*)' of type .* could not be converted to Float": r"{key}=\1: use a number",
    r"Value '(.*)' is not a valid bool.*": r"{key}=\1: use true or false",
    r".*is not Optional.*": r"{key}=null: needs a value",
    r".*Could not find '(.*)/(.*?)' Available options in '.*?': (.*?) Config search path.*": r"\1=\2: use one of: \3",
    r"Error parsing override '(.*?)' (.*?) See http.*": r"\1: is not KEY=VALUE (\2)",
    r"Config group override must be a string.*": r"a group of settings can not be null: name one of its files",
    r"(no viable alternative at input '.*') See http.*": r"the command line can not be parsed: \1",
}


def one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's messages as one line: key and value first, then what is allowed."""
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
