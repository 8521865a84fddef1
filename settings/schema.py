"""Typed settings: what `conf/` may say, and one clear line for whatever it may not.

Every default is written in `conf/`; this schema holds types, meanings and rules. settings/compose.py makes a
`RunConfig` of Hydra's overrides. Imports nothing of ours.
"""

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
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
    """Hub id or local folder of the base model."""
    quantization: str = required(pattern="^(4|8|none)$", description="one of 4, 8, none")
    """Bits of the frozen weights. The adapter is always float32."""
    trust_remote_code: bool = required()
    """Run Python code that the model's repository brings along."""
    cache_folder: str | None = required()
    """Keep the quantized base model here, so that it loads many times faster the next time."""
    lora: dict[str, Any] = passed_on()
    """Fields of `peft.LoraConfig`."""


@dataclass(kw_only=True, config=STRICT)
class DatasetConfig:
    name: str = required()
    """Hub id, or a local JSON, JSONL, CSV or Parquet file, or a folder of them."""
    subset: str | None = required()
    """Configuration of a Hub data set, of `eval_name` too; null for the only one."""
    split: str = required()
    """Split of a Hub data set, or of a folder whose files are named after theirs."""
    columns: dict[str, Any] = passed_on()
    """Which column is the instruction, input, output, system, history, messages, tools, prompt, completion or text;
    those that are not set are found by their names, and null leaves one out."""
    train_on: Literal["all", "last"] = required()
    """Answers of a conversation that carry loss."""
    eval_name: str | None = required()
    """As `name`: rows that nobody trains on, for `evaluate.every_rounds`."""
    eval_split: str = required()
    """As `split`, of `eval_name`."""
    category_column: str = required()
    """Column by whose values held-out rows are also evaluated, where the data has it."""
    template: str = required()
    """A template of conf/template, a Jinja chat template's path, or `tokenizer` for the model's own."""
    holdout: Number = required(ge=0, le=0.5)
    """Share of each partition's different rows that is never trained on, for evaluation on the clients."""
    partitioner: dict[str, Any] = passed_on()
    """`_target_`: a flwr_datasets partitioner; the rest are its arguments."""


@dataclass(kw_only=True, config=STRICT)
class TrainConfig:
    learning_rate_max: Number = required(gt=0, le=1)
    """Learning rate of the first round."""
    learning_rate_min: Number = required(ge=0, le=1)
    """Learning rate of the last round; cosine in between, constant within a round."""
    baseline_learning_rate_max: Number | None = required(gt=0, le=1)
    """Learning rate of the first round where `baseline` is set; null for the same."""
    seq_length: Whole = required(ge=16)
    """Longest row, in tokens, prompt and response together."""
    micro_batch_size: Whole = required(ge=1)
    """Rows in one forward pass. It does not change the gradient, only memory and padding."""
    save_every_round: Whole = required(ge=1)
    """Rounds between two checkpoints; the last round is always saved."""
    keep_checkpoints: Whole | None = required(ge=1)
    """How many checkpoints to keep besides the one with the lowest held-out loss; null keeps all."""
    early_stop_rounds: Whole | None = required(ge=1)
    """The run ends when the held-out loss was lowest this many rounds ago; null never."""
    training_arguments: dict[str, Any] = passed_on()
    """Fields of `trl.SFTConfig`."""

    @property
    def batch_size(self) -> int:
        """Rows of one optimizer step."""
        arguments = self.training_arguments
        return int(arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"])

    @property
    def tokens_at_once(self) -> int:
        """Most tokens of one pass, padding included, in training, evaluation and answering."""
        return min(self.micro_batch_size, self.batch_size) * self.seq_length

    @model_validator(mode="after")
    def check(self) -> Self:
        arguments = self.training_arguments
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"):
            value = arguments.get(key)
            if type(value) is not int or value < 1:
                raise SettingsError(f"train.training_arguments.{key}={value}: use a whole number of at least 1")
        value = arguments.get("gradient_checkpointing", False)
        if value is not True and value is not False and value != "auto":
            raise SettingsError(
                f"train.training_arguments.gradient_checkpointing={value}: use true, false, or auto (off where memory "
                "allows)"
            )
        if arguments.get("warmup_steps") and arguments.get("lr_scheduler_type", "constant") == "constant":
            raise SettingsError(
                f"train.training_arguments.warmup_steps={arguments['warmup_steps']}: has no effect on a constant rate; "
                "set train.training_arguments.lr_scheduler_type=constant_with_warmup too"
            )
        if self.learning_rate_min > self.learning_rate_max:
            raise SettingsError(
                f"train.learning_rate_min={self.learning_rate_min}: use at most train.learning_rate_max, "
                f"which is {self.learning_rate_max}"
            )
        if self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise SettingsError(
                f"train.micro_batch_size={self.micro_batch_size}: use a divisor of the {self.batch_size} rows of one "
                "step (per_device_train_batch_size x gradient_accumulation_steps)"
            )
        return self


@dataclass(kw_only=True, config=STRICT)
class EvaluateConfig:
    every_rounds: Whole = required(ge=1)
    """Rounds between two evaluations on `dataset.eval_name`; also before the first round and after the last."""
    answers: Whole = required(ge=0)
    """Held-out rows that are also answered, greedily, for exact match and ROUGE-L."""
    max_new_tokens: Whole = required(ge=1)
    """Longest answer, in tokens."""


@dataclass(kw_only=True, config=STRICT)
class SamplingConfig:
    """The keys of `strategy` that are ours; all others go to the strategy's constructor."""

    fraction_fit: Number = required(gt=0, le=1)
    """Share of the clients that train in a round."""
    fraction_evaluate: Number = required(ge=0, le=1)
    """Share of the clients that evaluate the new adapter on their held-out rows after a round."""
    round_timeout_s: Number = required(gt=0)
    """Seconds after which a round goes on without the clients that have not answered."""
    min_replies: Whole = required(ge=1)
    """Good replies that a round needs."""
    round_retries: Whole = required(ge=0)
    """How often a round with too few good replies asks other clients, before the run ends."""
    max_norm_ratio: Number | None = required(gt=1)
    """An update whose norm is above this many times the round's median is dropped; null accepts all."""
    max_bytes: Number | None = required(ge=1)
    """Bytes of adapters, down and up: the run ends before the round that would exceed them; null never."""
    final_wait_s: Number = required(ge=0)
    """Seconds for which sites that are away at the end are waited for, to hand them the adapter."""


@dataclass(kw_only=True, config=STRICT)
class ClientResources:
    num_cpus: Whole = required(ge=1)
    """CPU cores, and compute threads, of one worker."""
    num_gpus: Number = required(ge=0)
    """GPUs of one worker: 0 trains on the CPU; 0.5 puts two workers, with a base model each, on one GPU."""

    @model_validator(mode="after")
    def trains_on_one_gpu(self) -> Self:
        if self.num_gpus > 1:
            raise SettingsError(
                f"client_resources.num_gpus={self.num_gpus:g}: a worker trains on one GPU; set "
                "client_resources.num_gpus=1, and each further GPU trains another client of the round"
            )
        return self


@dataclass(kw_only=True, config=STRICT)
class RayConfig:
    address: str | None = required()
    """Address of a running Ray cluster (or `auto`); null: Ray is started on this machine, for this run."""


@dataclass(kw_only=True, config=STRICT)
class RunConfig:
    model: ModelConfig = Field(default_factory=ModelConfig)
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    strategy: dict[str, Any] = passed_on()
    """`_target_`: any Flower strategy; `SamplingConfig` and the strategy's own arguments."""
    client_resources: ClientResources = Field(default_factory=ClientResources)
    ray: RayConfig = Field(default_factory=RayConfig)
    num_clients: Whole = required(ge=1)
    """Participants, each with one partition of the data."""
    num_rounds: Whole = required(ge=1)
    seed: Whole = required(ge=0, le=2**31 - 1)
    """The same seed gives the same adapter, bit for bit on a CPU."""
    transfer: Literal["fp32", "fp16", "int8"] = required()
    """How adapters travel: whole in float32, or as differences in float16 or 8-bit integers."""
    baseline: Literal["alone", "central"] | None = required()
    """What to train instead of the federation, with as many optimizer steps, to compare it with. See `as_baseline`."""
    dry_run: bool = required()
    """Print what the run would do and take, instead of running it."""
    tracker: Tracker | None = required()
    """Where the numbers of each round go besides metrics.jsonl, through accelerate's trackers."""
    resume: str | None = required()
    """Folder of an interrupted run: it resumes from its last checkpoint."""
    resume_sweep: str | None = required()
    """Folder of an interrupted sweep: its complete jobs are not run again."""

    @property
    def sampling(self) -> SamplingConfig:
        """The part of `strategy` that says who takes part in a round."""
        return SamplingConfig(**{f.name: self.strategy[f.name] for f in fields(SamplingConfig)})

    @property
    def batch_size(self) -> int:
        """Rows of one optimizer step."""
        return self.train.batch_size

    @property
    def clients_per_round(self) -> int:
        """Clients that train in a round."""
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
    """Rules that span several sections."""
    train, sampling, num_clients = config.train, config.sampling, config.num_clients
    if config.baseline and train.learning_rate_min > (train.baseline_learning_rate_max or train.learning_rate_max):
        raise SettingsError(
            f"train.baseline_learning_rate_max={train.baseline_learning_rate_max}: use at least "
            f"train.learning_rate_min, which is {train.learning_rate_min}"
        )
    if not config.clients_per_round:
        raise SettingsError(
            f"strategy.fraction_fit={sampling.fraction_fit}: selects none of num_clients={num_clients}; "
            f"use at least {1 / num_clients:g}"
        )
    if sampling.min_replies > config.clients_per_round:
        raise SettingsError(
            f"strategy.min_replies={sampling.min_replies}: a round has {config.clients_per_round} clients "
            "(num_clients x strategy.fraction_fit); use at most that, or a larger strategy.fraction_fit"
        )
    share = sampling.fraction_evaluate
    if share and not share_of(num_clients, share) and config.baseline != "central":  # whose one client always does
        raise SettingsError(
            f"strategy.fraction_evaluate={share}: selects none of num_clients={num_clients}; use 0, or at least "
            f"{1 / num_clients:g}"
        )
    if share and not config.dataset.holdout:
        raise SettingsError(
            f"strategy.fraction_evaluate={share}: clients have no rows to evaluate on; "
            "set dataset.holdout, for example 0.05"
        )
    if train.early_stop_rounds and not config.is_measured:
        raise SettingsError(
            f"train.early_stop_rounds={train.early_stop_rounds}: nothing is held out to measure; set "
            "dataset.eval_name, or strategy.fraction_evaluate"
        )
    if train.early_stop_rounds and train.early_stop_rounds >= config.num_rounds:
        raise SettingsError(
            f"train.early_stop_rounds={train.early_stop_rounds}: cannot end a run of num_rounds={config.num_rounds}; "
            "use less"
        )
    for key, section in (("strategy", config.strategy), ("dataset.partitioner", config.dataset.partitioner)):
        if not isinstance(section.get("_target_"), str):
            raise SettingsError(f"{key}._target_={section.get('_target_')}: use the import path of a class")


def check_budget(config: RunConfig, payload_bytes: int, once_bytes: int) -> None:
    """Raise SettingsError if `strategy.max_bytes` is not even enough for the first round.

    Args:
        once_bytes: that one client sends before it.
    """
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
    longer = config.clients_per_round
    strategy = {
        key: value for key, value in config.strategy.items() if key in (f.name for f in fields(SamplingConfig))
    } | {"fraction_fit": 1.0, "min_replies": 1, "max_norm_ratio": None, "max_bytes": None}
    if config.baseline == "central":
        strategy["_target_"] = "flwr.serverapp.strategy.FedAvg"
        partitioner: dict[str, Any] = {"_target_": "flwr_datasets.partitioner.IidPartitioner"}
    else:
        strategy["_target_"] = "server.strategies.Alone"
        partitioner = config.dataset.partitioner
    return replace(
        config,
        num_clients=1 if config.baseline == "central" else config.num_clients,
        num_rounds=longer * config.num_rounds,
        strategy=strategy,
        dataset=replace(config.dataset, partitioner=partitioner),
        train=replace(
            config.train,
            learning_rate_max=config.train.baseline_learning_rate_max or config.train.learning_rate_max,
            save_every_round=longer * config.train.save_every_round,
            early_stop_rounds=None,
        ),
        evaluate=replace(config.evaluate, every_rounds=longer * config.evaluate.every_rounds),
    )


def check_keywords(key: str, given: Mapping[str, Any], target: Any, managed: Mapping[str, str] | None = None) -> None:
    """Raise SettingsError for a keyword that `target` lacks, or that another setting (`managed`) decides."""
    parameters = inspect.signature(target).parameters
    known = [name for name in parameters if name not in ("self", "args", "kwargs")]
    for name, value in given.items():
        if managed and name in managed:
            raise SettingsError(f"{key}.{name}={given[name]}: decided by this suite; {managed[name]}")
        if name not in known and name != "_target_":
            ours = [own.name for own in fields(SamplingConfig)] if key == "strategy" else []
            hint = suggest(name, [*known, *ours])
            raise SettingsError(f"{key}.{name}={given[name]}: {target.__name__} has no such field{hint}")
        default = parameters[name].default if name in parameters else None
        if type(default) in (int, float) and (isinstance(value, str) or value is None):
            raise SettingsError(f"{key}.{name}={value}: use a number")


KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}
BOUNDS = {  # as pydantic's JSON schemas name them
    "ge": "of at least", "minimum": "of at least", "gt": "above", "exclusiveMinimum": "above",
    "le": "at most", "maximum": "at most", "lt": "below", "exclusiveMaximum": "below",
}  # fmt: skip


def made(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The settings of this `kind` that have these `values`.

    Raises:
        SettingsError: for the first that is unknown, of another type, out of range, or does not fit the others.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(reason := first.get("ctx", {}).get("error"), SettingsError):
            raise reason from error
        whole = rule = TypeAdapter(kind).json_schema()
        value, key = values, prefix.rstrip(".")
        for name in first["loc"]:
            if name not in rule.get("properties", {}):
                break
            key, value, rule = f"{key}.{name}".lstrip("."), value[str(name)], rule["properties"][name]
            rule = whole["$defs"][rule["$ref"].rpartition("/")[2]] if "$ref" in rule else rule
        if first["type"] == "unexpected_keyword_argument":
            key = f"{key}.{first['loc'][-1]}".lstrip(".")
            raise SettingsError(f"{key}: there is no such setting{suggest(key, setting_names())}") from error
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
