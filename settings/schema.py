"""Typed settings: what `conf/` may say, and one clear line for whatever it may not.

`conf/` says of every setting what it means and what it is by default; this schema holds types and rules.
settings/compose.py makes a `RunConfig` of Hydra's overrides. Imports nothing of ours.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "conf"
PASSED_ON = ("model.lora", "dataset.columns", "dataset.partitioner", "train.training_arguments", "strategy")
# the only names of a server's run that mean something everywhere: what the suite ships, and OWNER/NAME of the Hub
SHIPPED_NAMES = ("quickstart/data/train.jsonl", "quickstart/data/heldout.jsonl", "quickstart/model")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
MISSING: Any = "???"  # OmegaConf's word for a value that conf/ has to give
STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class SettingsError(ValueError):
    """A setting or an input that the user has to change; the message is one line that says how."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # whatever the user's own value holds


class RunError(RuntimeError):
    """A run that cannot go on; the message says what happened and to whom."""


class WorkerError(RunError):
    """A worker's process is of no use any more, as after a fault of its GPU, and has to be replaced."""


def public(error: Any, told: str | None = None) -> Any:
    """`error`, marked: its text, or `told` in its place, may leave a node: no row, no path, nothing of this machine."""
    error.told = str(error) if told is None else told
    return error


def not_a(*kinds: type) -> BeforeValidator:
    """Refuses what pydantic would take for a number, but nobody would write for one."""

    def check(value: Any) -> Any:
        if isinstance(value, kinds):
            raise ValueError
        return value

    return BeforeValidator(check)


Whole = Annotated[int, not_a(bool, float)]
Number = Annotated[float, not_a(bool)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]


def required(**rules: Any) -> Any:
    """A setting that conf/ gives a value; `rules` are pydantic's."""
    return Field(default=MISSING, **rules)


def passed_on() -> Any:
    """Keyword arguments of a library's class: any key may be set; `check_keywords` knows which exist."""
    return Field(default_factory=dict)


@dataclass(kw_only=True, config=STRICT)
class ModelConfig:
    name: str = required()
    quantization: str = required(pattern="^(4|8|none)$", description="one of 4, 8, none")
    trust_remote_code: bool = required()
    cache_folder: str | None = required()
    lora: dict[str, Any] = passed_on()


@dataclass(kw_only=True, config=STRICT)
class DatasetConfig:
    name: str = required()
    subset: str | None = required()
    split: str = required()
    columns: dict[str, Any] = passed_on()
    train_on: Literal["all", "last"] = required()
    eval_name: str | None = required()
    eval_split: str = required()
    category_column: str = required()
    template: str = required()
    holdout: Number = required(ge=0, le=0.5)
    partitioner: dict[str, Any] = passed_on()


@dataclass(kw_only=True, config=STRICT)
class TrainConfig:
    learning_rate_max: Number = required(gt=0, le=1)
    learning_rate_min: Number = required(ge=0, le=1)
    baseline_learning_rate_max: Number | None = required(gt=0, le=1)
    seq_length: Whole = required(ge=16)
    micro_batch_size: Whole = required(ge=1)
    save_every_round: Whole = required(ge=1)
    keep_checkpoints: Whole | None = required(ge=1)
    early_stop_rounds: Whole | None = required(ge=1)
    training_arguments: dict[str, Any] = passed_on()

    @property
    def batch_size(self) -> int:
        """Rows of one optimizer step."""
        arguments = self.training_arguments
        return int(arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"])

    @property
    def tokens_at_once(self) -> int:
        """Most tokens of one pass, padding included, in training, evaluation and answering."""
        return min(self.micro_batch_size, self.batch_size) * self.seq_length


@dataclass(kw_only=True, config=STRICT)
class EvaluateConfig:
    every_rounds: Whole = required(ge=1)
    answers: Whole = required(ge=0)
    max_new_tokens: Whole = required(ge=1)


@dataclass(kw_only=True, config=STRICT)
class SamplingConfig:
    """The keys of `strategy` that are ours; all others go to the strategy's constructor."""

    fraction_fit: Number = required(gt=0, le=1)
    fraction_evaluate: Number = required(ge=0, le=1)
    round_timeout_s: Number = required(gt=0)
    min_replies: Whole = required(ge=1)
    round_retries: Whole = required(ge=0)
    max_norm_ratio: Number | None = required(gt=1)
    max_bytes: Number | None = required(ge=1)
    final_wait_s: Number = required(ge=0)


@dataclass(kw_only=True, config=STRICT)
class ClientResources:
    num_cpus: Whole = required(ge=1)
    num_gpus: Number = required(ge=0)


@dataclass(kw_only=True, config=STRICT)
class RayConfig:
    address: str | None = required()


@dataclass(kw_only=True, config=STRICT)
class RunConfig:
    model: ModelConfig = Field(default_factory=ModelConfig)
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    strategy: dict[str, Any] = passed_on()
    client_resources: ClientResources = Field(default_factory=ClientResources)
    ray: RayConfig = Field(default_factory=RayConfig)
    num_clients: Whole = required(ge=1)
    num_rounds: Whole = required(ge=1)
    seed: Whole = required(ge=0, le=2**31 - 1)
    transfer: Literal["fp32", "fp16", "int8"] = required()
    baseline: Literal["alone", "central"] | None = required()
    dry_run: bool = required()
    tracker: Tracker | None = required()
    resume: str | None = required()
    resume_sweep: str | None = required()

    @property
    def sampling(self) -> SamplingConfig:
        """The part of `strategy` that says who takes part in a round."""
        return SamplingConfig(**{f.name: self.strategy[f.name] for f in fields(SamplingConfig)})

    @property
    def batch_size(self) -> int:
        return self.train.batch_size

    @property
    def clients_per_round(self) -> int:
        return share_of(self.num_clients, self.sampling.fraction_fit)

    @property
    def is_measured(self) -> bool:
        """Whether anything is evaluated on held-out rows."""
        return bool(self.dataset.eval_name or self.sampling.fraction_evaluate)

    def evaluators_after(self, round_number: int) -> int:
        """How many clients evaluate on `dataset.eval_name`: one, or all if each has an adapter of its own."""
        return self.num_clients if self.baseline == "alone" and round_number else 1

    def evaluates_after(self, round_number: int) -> bool:
        """Whether it is the turn of `dataset.eval_name`; round 0 is before the first."""
        last = round_number == self.num_rounds
        return bool(self.dataset.eval_name) and (last or round_number % self.evaluate.every_rounds == 0)

    def evaluations_after(self, round_number: int, num_clients: int) -> int:
        """Adapters that go out to be evaluated after a round, when `num_clients` are there."""
        share = self.sampling.fraction_evaluate
        own = max(1, share_of(num_clients, share)) if share else 0
        return own + self.evaluates_after(round_number) * min(self.evaluators_after(round_number), num_clients)


def share_of(count: int, fraction: float) -> int:
    """Flower's rounding, int(count * fraction), but safe against 0.29 * 100 = 28.999..."""
    return int(count * fraction + 1e-9)


def check_together(config: RunConfig) -> None:
    """Raise SettingsError for the first rule that a value breaks beside others, or beside its type and range."""
    if fault := next(chain(faults_of_training(config.train), faults_of_run(config)), None):
        raise SettingsError(fault)


def faults_of_training(train: TrainConfig) -> Iterator[str]:
    arguments, key = train.training_arguments, "train.training_arguments"
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"):
        if type(value := arguments.get(name)) is not int or value < 1:
            yield f"{key}.{name}={value}: use a whole number of at least 1"
    value = arguments.get("gradient_checkpointing", False)
    if not isinstance(value, bool) and value != "auto":
        yield f"{key}.gradient_checkpointing={value}: use true, false, or auto (off where memory allows)"
    if arguments.get("warmup_steps") and arguments.get("lr_scheduler_type", "constant") == "constant":
        yield (
            f"{key}.warmup_steps={arguments['warmup_steps']}: has no effect on a constant rate; "
            f"set {key}.lr_scheduler_type=constant_with_warmup too"
        )
    lowest, highest = train.learning_rate_min, train.learning_rate_max
    if lowest > highest:
        yield f"train.learning_rate_min={lowest}: use at most train.learning_rate_max, which is {highest}"
    if train.batch_size % min(train.micro_batch_size, train.batch_size):
        yield (
            f"train.micro_batch_size={train.micro_batch_size}: use a divisor of the {train.batch_size} rows of one "
            "step (per_device_train_batch_size x gradient_accumulation_steps)"
        )


def faults_of_run(config: RunConfig) -> Iterator[str]:
    train, sampling, num_clients = config.train, config.sampling, config.num_clients
    if (count := config.client_resources.num_gpus) > 1:
        yield (
            f"client_resources.num_gpus={count:g}: a worker trains on one GPU; set client_resources.num_gpus=1, and "
            "each further GPU trains another client of the round"
        )
    lowest, highest = train.learning_rate_min, train.baseline_learning_rate_max
    if config.baseline and lowest > (highest or train.learning_rate_max):
        yield f"train.baseline_learning_rate_max={highest}: use at least train.learning_rate_min, which is {lowest}"
    none_of = f"selects none of num_clients={num_clients}; use"
    if not config.clients_per_round:
        yield f"strategy.fraction_fit={sampling.fraction_fit}: {none_of} at least {1 / num_clients:g}"
    if sampling.min_replies > config.clients_per_round:
        yield (
            f"strategy.min_replies={sampling.min_replies}: a round has {config.clients_per_round} clients "
            "(num_clients x strategy.fraction_fit); use at most that, or a larger strategy.fraction_fit"
        )
    share = sampling.fraction_evaluate
    key = f"strategy.fraction_evaluate={share}"
    if share and not share_of(num_clients, share) and config.baseline != "central":  # whose one client always does
        yield f"{key}: {none_of} 0, or at least {1 / num_clients:g}"
    if share and not config.dataset.holdout:
        yield f"{key}: clients have no rows to evaluate on; set dataset.holdout, for example 0.05"
    patience = train.early_stop_rounds
    key = f"train.early_stop_rounds={patience}"
    if patience and not config.is_measured:
        yield f"{key}: nothing is held out to measure; set dataset.eval_name, or strategy.fraction_evaluate"
    if patience and patience >= config.num_rounds:
        yield f"{key}: cannot end a run of num_rounds={config.num_rounds}; use less"
    for key, section in (("strategy", config.strategy), ("dataset.partitioner", config.dataset.partitioner)):
        if not isinstance(section.get("_target_"), str):
            yield f"{key}._target_={section.get('_target_')}: use the import path of a class"


def check_budget(config: RunConfig, payload_bytes: int, once_bytes: int) -> None:
    """Raise SettingsError if `strategy.max_bytes` is not enough for the first round; `once_bytes` go before it."""
    most = config.sampling.max_bytes
    count = sum(config.evaluations_after(number, config.num_clients) for number in (0, 1))
    first = payload_bytes * (2 * config.clients_per_round + count) + once_bytes
    if most is not None and first > most:
        raise SettingsError(f"strategy.max_bytes={most:.10g}: use at least the {first} bytes of the first round")


def as_baseline(config: RunConfig) -> RunConfig:
    """The run that `baseline` asks for: as many optimizer steps and rows for each model as the federation's.

    `central` gives one client all data; `alone` lets every client keep its adapter to itself. In a round of either a
    model takes the steps of one client, and in the federation's those of `clients_per_round`, so there are as many
    times more rounds.
    """
    if config.baseline is None:
        return config
    longer, train, dataset = config.clients_per_round, config.train, config.dataset
    strategy: dict[str, Any] = {"fraction_fit": 1.0, "min_replies": 1, "max_norm_ratio": None, "max_bytes": None}
    if config.baseline == "central":
        strategy["_target_"] = "flwr.serverapp.strategy.FedAvg"
        dataset = replace(dataset, partitioner={"_target_": "flwr_datasets.partitioner.IidPartitioner"})
    else:
        strategy["_target_"] = "server.strategies.Alone"
    return replace(
        config,
        num_clients=1 if config.baseline == "central" else config.num_clients,
        num_rounds=longer * config.num_rounds,
        strategy=asdict(config.sampling) | strategy,
        dataset=dataset,
        train=replace(
            train,
            learning_rate_max=train.baseline_learning_rate_max or train.learning_rate_max,
            save_every_round=longer * train.save_every_round,
            early_stop_rounds=None,
        ),
        evaluate=replace(config.evaluate, every_rounds=longer * config.evaluate.every_rounds),
    )


def check_keywords(key: str, given: Mapping[str, Any], target: Any, managed: Mapping[str, str]) -> None:
    """Raise SettingsError for a keyword that `target` lacks, or that another setting (`managed`) decides."""
    parameters = signature(target).parameters.items()
    known = {name: rule.default for name, rule in parameters if name not in ("args", "kwargs")}
    for name, value in given.items():
        if name in managed:
            raise SettingsError(f"{key}.{name}={value}: decided by this suite; {managed[name]}")
        if name == "_target_":
            continue
        if name not in known:
            ours = [own.name for own in fields(SamplingConfig)] if key == "strategy" else []
            hint = suggest(name, [*known, *ours])
            raise SettingsError(f"{key}.{name}={value}: {target.__name__} has no such field{hint}")
        if type(known[name]) in (int, float) and (isinstance(value, str) or value is None):
            raise SettingsError(f"{key}.{name}={value}: use a number")


KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}
BOUNDS = {  # as pydantic's JSON schemas name them
    "ge": "of at least", "minimum": "of at least", "gt": "above", "exclusiveMinimum": "above",
    "le": "at most", "maximum": "at most", "lt": "below", "exclusiveMaximum": "below",
}  # fmt: skip


def made(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The settings of this `kind`. Raises SettingsError for the first that is unknown, or of a wrong type or range."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        whole = rule = TypeAdapter(kind).json_schema()
        value, key = values, prefix.rstrip(".")
        for name in first["loc"]:
            if name not in rule.get("properties", {}):
                break
            key, value, rule = f"{key}.{name}".lstrip("."), value[str(name)], rule["properties"][name]
            rule = whole["$defs"][rule["$ref"].rpartition("/")[2]] if "$ref" in rule else rule
        if first["type"] == "unexpected_keyword_argument":
            key = f"{key}.{first['loc'][-1]}".lstrip(".")
            raise SettingsError(f"{key}: there is no such setting{suggest(key, setting_names(kind))}") from error
        raise SettingsError(f"{key}={'null' if value is None else value}: {allowed(key, value, rule)}") from error


def allowed(key: str, value: Any, rule: Mapping[str, Any]) -> str:
    """What to do about a value that breaks the `rule` of its setting, a JSON schema."""
    options = rule.get("anyOf", [rule])
    kind = options[0]
    if kind.get("type") == "object" and "description" not in rule:
        return f"holds several settings; set them one by one, as {key}.KEY=VALUE"
    if value is None:
        return "needs a value"
    if "description" in rule:
        return f"use {rule['description']}"
    if "enum" in kind:
        words = "one of " + ", ".join(kind["enum"])
    elif kind["type"] == "string":
        words = f"text; where it holds brackets, commas or the like, in quotes: '{key}=\"...\"'"
    else:
        bounds = [f"{BOUNDS[name]} {kind[name]:.10g}" for name in BOUNDS if name in kind]
        words = " ".join([KINDS[kind["type"]], " and ".join(bounds)]).rstrip()
    return f"use {words}" + (", or null" if len(options) > 1 else "")


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
