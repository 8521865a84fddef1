"""Before the start: check that a run can work, and say what it will take. Loads no base model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dataset
import model as adapters
from dataset import NO_ANSWER, Rows, Survey, encoded, survey
from hub import models as hub
from learning.memory import Sizes, describe_memory, sizes
from learning.training import training_arguments
from server.engine import check_machine, idle_gpus
from server.sampling import Budget
from server.strategies import make_strategy
from settings.schema import RunConfig, SettingsError, check_budget, share_of
from utils import bytes_text, local_path, quiet_libraries

UNKNOWN = "unknown without the network"


def check_names(config: RunConfig) -> None:
    """Raise SettingsError for classes and arguments that do not exist. Reads no data and no network."""
    make_strategy(config)
    dataset.partitioner_class(config.dataset)
    lora = adapters.lora_config(config.model)
    if not config.client_resources.num_gpus:
        adapters.check_device(lora.use_dora, config.model.quantization, "cpu")
    if config.dataset.template != "tokenizer":
        dataset.find_template(config.dataset.template)
    try:
        training_arguments(config, "unused")
    except (TypeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"train.training_arguments: {adapters.first_sentence(error)}") from error


@dataclass(frozen=True)
class Inputs:
    """What a run was found to have, besides weights."""

    template: str
    """The chat template."""
    surveys: Sequence[Survey] = ()
    """What the data holds, and what of it is left out; none where only the clients have rows."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprints of the rows, of the held-out ones as `held_out`; none where only the clients have rows."""
    idle_gpus: str | None = None
    """That GPUs of this machine stay idle, and what to do about it."""

    @property
    def for_results(self) -> dict[str, Any]:
        """What of it results.json says."""
        return {"held_out_rows_trained_on": self.data.get("held_out", {}).get("also_trained_on", 0)}

    @property
    def warnings(self) -> list[str]:
        """What the user should know before the first round."""
        shared = self.for_results["held_out_rows_trained_on"]
        text = f"dataset.eval_name: {shared} of its rows are trained on too: they are in dataset.name as well"
        return ([text] if shared else []) + ([self.idle_gpus] if self.idle_gpus else [])


def check_inputs(config: RunConfig) -> Inputs:
    """Load what the clients will need besides weights, once.

    Raises SettingsError if model, tokenizer or data are missing, do not fit, or are too few for the clients.
    """
    adapters.adapter_plan(config.model, adapters.read_config(config.model))
    tokenizer = adapters.read_tokenizer(config.model)
    template = dataset.read_template(config.dataset, tokenizer)
    rows, found = trained_on(config, tokenizer, template)
    facts, surveys = dataset.data_facts(rows), [found]
    if config.dataset.eval_name:
        held_out, column = dataset.load_eval_rows(config.dataset), config.dataset.category_column
        surveys.append(surveyed(config, held_out, tokenizer, template))
        if column not in ("", "category", *held_out.table.column_names):
            names = ", ".join(held_out.table.column_names)
            raise SettingsError(f"dataset.category_column={column}: {config.dataset.eval_name} has {names}")
        shared = len(dataset.shared_rows(rows, held_out))
        facts |= {"held_out": dataset.data_facts(held_out) | {"also_trained_on": shared}}
    return Inputs(template, surveys, facts, idle_gpus(config))


def trained_on(config: RunConfig, tokenizer: Any, template: str) -> tuple[Rows, Survey]:
    """The rows of `dataset.name`, divided between the clients, and what they hold. Raises as `surveyed`."""
    rows = dataset.load_rows(config.dataset)
    dataset.partition_rows(rows, config.dataset, config.num_clients, config.seed)
    return rows, surveyed(config, rows, tokenizer, template)


def surveyed(config: RunConfig, rows: Rows, tokenizer: Any, template: str) -> Survey:
    """What `rows` hold, and which of them the chat template refuses; without a tokenizer it is not asked.

    Raises SettingsError if nothing is left of them.
    """
    limit, train_on = config.train.seq_length, config.dataset.train_on
    found = survey(rows, lambda row: encoded(tokenizer, template, row, limit, train_on) if tokenizer else None)
    if sum(found.left_out.values()) == len(rows):
        if reasons := [reason for reason in found.left_out if reason != NO_ANSWER]:
            none = f"dataset.template={config.dataset.template}: makes no prompt of {rows.name}"
            told = f"rows {'; '.join(reasons)}; choose another, such as dataset.template=alpaca"
            raise SettingsError(f"{none}: {told}")
        raise SettingsError(f"{rows.name}: none of its rows has an output")
    return found


def show_plan(config: RunConfig, folder: Path) -> float:
    """Print what the run would do and take; checks all that needs neither a model nor the network. Returns 0."""
    quiet_libraries()
    check_names(config)
    lines = {name: text for name, text in plan(config, folder).items() if text}
    for name, text in lines.items():
        print(f"{name:<{max(map(len, lines))}}  {text}")
    return 0.0


def plan(config: RunConfig, folder: Path) -> dict[str, str]:
    """What the run will do and take, for people; what only the network could tell is said to be unknown."""
    train, wanted, count, sampling = config.train, config.client_resources, config.clients_per_round, config.sampling
    steps, rounds = train.training_arguments["max_steps"], config.num_rounds
    strategy = config.strategy["_target_"].rsplit(".", 1)[-1]
    stop = train.early_stop_rounds
    return {
        "base model": f"{config.model.name}, quantization {config.model.quantization}",
        **describe_data(config),
        "rounds": f"{rounds}, {count} of {config.num_clients} clients in each ({strategy})",
        "optimizer steps": f"{count * rounds * steps}: {steps} for a client in a round, {config.batch_size} rows each",
        "learning rate": f"{train.learning_rate_max:g} falling to {train.learning_rate_min:g}",
        "held-out loss": describe_evaluation(config),
        **plan_sizes(config),
        "checkpoints": describe_checkpoints(config),
        "ends early": f"when the held-out loss was lowest {stop} rounds ago" if stop else "",
        "good replies": f"at least {sampling.min_replies} a round; retries: {sampling.round_retries}",
        "workers": f"{wanted.num_cpus} CPU cores, {wanted.num_gpus:g} GPUs each",
        "this machine": fits_here(config),
        "results": str(folder),
    }


def describe_evaluation(config: RunConfig) -> str:
    data, share, parts = config.dataset, config.sampling.fraction_evaluate, []
    if data.eval_name:
        if dataset.local_rows(data.eval_name, "dataset.eval_name"):
            surveyed(config, dataset.load_eval_rows(data), *prompter(config))
        parts.append(f"of {data.eval_name} before and after the run and every {config.evaluate.every_rounds} rounds")
    if share:
        count = max(1, share_of(config.num_clients, share))
        parts.append(f"of {data.holdout:.0%} of the rows of {count} clients after every round")
    return ", and ".join(parts)


def describe_checkpoints(config: RunConfig) -> str:
    every = config.train.save_every_round
    count = -(-config.num_rounds // every)
    kept = min(count, config.train.keep_checkpoints or count)
    best, also = (" and whenever the held-out loss is lowest", ", and the best") if config.is_measured else ("", "")
    return f"every {every} rounds{best}; {kept} of {count} kept{also}"


def describe_data(config: RunConfig) -> dict[str, str]:
    kind = dataset.partitioner_class(config.dataset).__name__
    if dataset.local_rows(config.dataset.name) is None:
        return {"data": f"{config.dataset.name} ({kind}); number of rows {UNKNOWN}"}
    rows, found = trained_on(config, *prompter(config))
    left_out = "more than half of the rows are not used" if found.is_mostly_left_out else ""
    return {"data": f"{config.dataset.name}, {len(rows)} rows, {kind}", "rows": str(found), "WARNING": left_out}


def prompter(config: RunConfig) -> tuple[Any, str]:
    """Tokenizer and chat template, where the model is a folder: of the Hub's there may be only a part here."""
    if local_path(config.model.name) is None:
        return None, ""
    tokenizer = adapters.read_tokenizer(config.model, offline=True)
    return tokenizer, dataset.read_template(config.dataset, tokenizer)


def plan_sizes(config: RunConfig) -> dict[str, str]:
    """Adapter, traffic and memory, if the base model's shapes are on this machine; then its tokenizer fits too."""
    if hub.cached_model(config.model.name, code=config.model.trust_remote_code) is None:
        return dict.fromkeys(("adapter", "bytes down and up", "memory of a step"), UNKNOWN)
    size = sizes(adapters.read_config(config.model, offline=True), config)
    check_budget(config, size.payload_bytes, size.once_bytes)
    rounds, sent, returned = traffic(config, size)
    early = "" if rounds == config.num_rounds else f"; strategy.max_bytes ends the run after round {rounds}"
    return {
        "adapter": f"{bytes_text(4 * size.adapter)}, {size.adapter:,} parameters of {size.linear + size.other:,}",
        "bytes down and up": f"{bytes_text(size.payload_bytes * sent)} and "
        f"{bytes_text(size.payload_bytes * returned + size.once_bytes)} in all, "
        f"{bytes_text(size.payload_bytes)} an adapter{early}",
        "memory of a step": describe_memory(config, size),
    }


def traffic(config: RunConfig, size: Sizes) -> tuple[int, int, int]:
    """Rounds that `strategy.max_bytes` allows, and adapters sent down and up in them, if no client fails."""
    budget, here, count = Budget(config, size.payload_bytes), config.num_clients, config.clients_per_round
    sent, returned = config.evaluations_after(0, here), 0
    for number in range(1, config.num_rounds + 1):
        left = budget.most - size.once_bytes - (sent + returned) * size.payload_bytes
        if budget.of_round(number, here, count) > left:
            last = budget.ends_after(number - 1, here, left) and not config.evaluates_after(number - 1)
            return number - 1, sent + last, returned
        sent, returned = sent + count + config.evaluations_after(number, here), returned + count
    return config.num_rounds, sent, returned


def fits_here(config: RunConfig) -> str:
    try:
        check_machine(config)
    except SettingsError as error:
        return f"cannot run it: {error}"
    return idle_gpus(config) or "has room for at least one worker"
