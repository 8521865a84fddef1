"""The server's side of a round: sample clients, check replies, aggregate, checkpoint, record.

The round loop is ours and the arithmetic is Flower's: a strategy's `configure_train` and
`aggregate_train` are called as Flower's own loop calls them, but which clients take part is drawn
from (seed, round) by partition id, because Flower's node ids are random in every run.
"""

import dataclasses
import functools
import json
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from hydra.utils import get_class
from safetensors import SafetensorError

import checkpoint
import model as adapters
import stopping
import transfer
from card import write_card
from checkpoint import State
from clients import Clients, Progress, last_line
from config import RunConfig, RunError, SamplingConfig, SettingsError, check_budget, check_keywords, share_of
from evaluation import Scores, figures
from guard import (
    MOST,
    PARTS,
    TOTALS,
    check_adapter,
    check_reply,
    check_scores,
    metrics_of,
    outliers,
    process_of,
    scores_of,
    tokens_of,
    update_norm,
)
from model import Adapter
from plots import plot_loss
from resident import SETTINGS_ERROR
from runfolder import METRICS_FILE, RESULTS_FILE, folder_of, rounds_in
from transfer import to_record
from utils import (
    PLOT_FILE,
    append_json_line,
    best_round,
    cosine_learning_rate,
    file_sha256,
    generator,
    held_out_losses,
    peak_resident_bytes,
    read_json_lines,
    totals_so_far,
    write_json,
    write_whole,
)

log = logging.getLogger(__name__)

NORM_ROUNDS = 5  # rounds whose updates say what size is ordinary


def make_strategy(config: RunConfig) -> Strategy:
    """The Flower strategy that `strategy._target_` names, set to take every client that it is shown.

    Raises:
        SettingsError: for a class that does not exist or is no strategy, and for arguments that do not fit.
    """
    target = config.strategy["_target_"]
    try:
        chosen = get_class(target)
    except Exception as error:
        raise SettingsError(f"strategy._target_={target}: there is no such class") from error
    if "ClientSide" in chosen.__name__:
        raise SettingsError(
            f"strategy._target_={target}: clips on the clients, which is not built in; use its server-side twin"
        )
    if not issubclass(chosen, Strategy):
        raise SettingsError(
            f"strategy._target_={target}: not a message-based Flower strategy (flwr.serverapp.strategy)"
        )
    own = {entry.name for entry in dataclasses.fields(SamplingConfig)}
    arguments = {key: value for key, value in config.strategy.items() if key not in own}
    decided = {
        "fraction_train": "set strategy.fraction_fit",
        **dict.fromkeys(("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), "set strategy.fraction_fit"),
        **dict.fromkeys(
            ("weighted_by_key", "arrayrecord_key", "configrecord_key"), "clients answer with Flower's names"
        ),
    }
    check_keywords("strategy", arguments, chosen, decided)
    try:
        strategy: Strategy = hydra.utils.instantiate(arguments)
    except Exception as error:
        raise SettingsError(
            f"strategy: {chosen.__name__} refuses its arguments ({' '.join(str(error).split())[:200]})"
        ) from error
    for part in (strategy, getattr(strategy, "strategy", None)):  # the differential-privacy strategies wrap another
        for name in ("fraction_train", "fraction_evaluate"):
            if hasattr(part, name):
                setattr(part, name, 1.0)
        for name in ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"):
            if hasattr(part, name):
                setattr(part, name, 1)
    return strategy


def sample(partitions: Iterable[int], count: int, *key: str | int) -> list[int]:
    """`count` of the partition ids, drawn without replacement from the generator of `key`, sorted."""
    drawn = generator(*key).choice(sorted(partitions), size=count, replace=False)
    return sorted(int(partition) for partition in drawn)


class ShownNodes:
    """A Grid on which a strategy sees only the nodes that were sampled for this round."""

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        self._grid, self._node_ids = grid, list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._node_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class BudgetSpent(Exception):
    """The next messages would exceed `strategy.max_bytes`."""


class Federation:
    """One run, from asking the clients who they are to the last checkpoint."""

    def __init__(self, config: RunConfig, folder: Path, template: str, progress: Progress) -> None:
        self.config, self.folder, self.template, self.progress = config, folder, template, progress
        self.strategy = make_strategy(config)
        self.lora, self.shapes = adapters.adapter_plan(config.model, adapters.read_config(config.model))
        self.state = State(adapters.initial_adapter(self.shapes, self.lora, config.seed))
        self.initial = self.state.adapter
        self.sent: dict[int, Adapter] = {}  # by partition id: the adapter that the client was sent last
        self.metrics: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        self.saved = 0  # round of the newest checkpoint
        self.waited_s = 0.0  # until the first round
        self.clients: Clients  # from the start of `run` on
        self.facts: dict[str, Any] = {}  # more for results.json
        self.norms: dict[int, float] = {}  # by partition id: sizes of this round's good updates
        self.payload_bytes = transfer.payload_bytes(self.shapes, config.transfer)
        self.before: dict[str, Any] = {}  # what the held-out rows said before the first round
        once_bytes = adapters.starts_from_base(self.shapes) * transfer.payload_bytes(self.shapes, "fp32")
        check_budget(config, self.payload_bytes, once_bytes)
        self.spare: set[int] = set()  # rounds that have a checkpoint only because they were the best
        self.global_tokens: float | None = None  # of dataset.eval_name, by the first who counted them

    def run(self, grid: Grid) -> dict[str, Any]:
        """All rounds that are left; returns the summary that results.json holds.

        However it ends, the last whole round has a checkpoint. It ends early when held-out rows say that it no longer
        improves (`train.early_stop_rounds`), or when the next round would cost too much (`strategy.max_bytes`).

        Raises:
            RunError: if a round has too few valid replies, or results cannot be written.
        """
        started, ended = time.perf_counter(), None
        self.progress.say("waiting for the clients")
        try:
            self.clients = Clients(grid, self.config.sampling.round_timeout_s, self.progress)
            self.clients.wait_for(self.config.num_clients)
            self.clients.strict = False
            self.complete_adapter()
            self.waited_s = time.perf_counter() - started
            try:
                if not self.state.round_number:
                    self.before = self.evaluate(0, self.state.adapter)
                while self.state.round_number < self.config.num_rounds and not (ended := self.no_better()):
                    self.play_round(self.state.round_number + 1)
            except BudgetSpent as spent:
                if not self.state.round_number:
                    raise RunError(str(spent)) from spent
                ended = str(spent)
                self.charge()
            return self.summarize(ended)
        except BaseException:
            self.save_last_round()
            raise

    def complete_adapter(self) -> None:
        """Fetch from one client the tensors whose first values depend on the base weights (DoRA's magnitudes)."""
        if set(self.initial) == set(self.shapes):
            return
        ask = Message(RecordDict(), self.clients.nodes[min(self.clients.nodes)], f"{MessageType.QUERY}.initial_adapter")
        replies = list(self.clients.exchange([ask]).values())
        raise_shared_refusal(replies, 1)
        fault = check_adapter(replies[0], self.shapes) if replies else f"no reply in {self.clients.timeout_s:g}s"
        if fault:
            raise RunError(f"no initial adapter: {fault}")
        received: Any = replies[0].content["arrays"]
        self.initial = dict(sorted(({name: received[name].numpy() for name in self.shapes} | self.initial).items()))
        if not self.state.round_number:
            self.state = State(self.initial)
        else:
            self.clients.take_traffic()  # the first round has it already

    def play_round(self, round_number: int) -> None:
        """Sample, train, check, aggregate, record; a checkpoint every `save_every_round` rounds."""
        start = time.perf_counter()
        train = self.config.train
        learning_rate = cosine_learning_rate(
            round_number, self.config.num_rounds, train.learning_rate_max, train.learning_rate_min
        )
        good, dropped, retries = self.collect(round_number, learning_rate)
        aggregating = time.perf_counter()
        adapter = self.aggregate(round_number, [reply for _, reply in good])
        aggregated = time.perf_counter()
        rows_seen = dict(self.state.rows_seen)
        line: dict[str, Any] = {"round": round_number, "learning_rate": learning_rate}
        line |= self.account(good, rows_seen) | {"dropped": dropped, "retries": retries, "update_norms": self.norms}
        line |= {"held_out_before": self.before} if round_number == 1 and self.before else {}
        line |= {"held_out": found} if (found := self.evaluate(round_number, adapter)) else {}
        line |= self.clients.take_traffic()
        line["seconds"] |= {
            "transfer": max(0.0, aggregating - start - busiest_process(good)),
            "aggregate": aggregated - aggregating,
            "wall": (wall := time.perf_counter() - start),
        }
        kept = checkpoint.strategy_state(self.strategy)
        with stopping.held():  # a signal waits until the round is on disk
            self.record(line, State(adapter, round_number, rows_seen, self.state.elapsed_s + wall, kept))
        log.info("round %s: %s", round_number, line)
        self.progress.round_done(line)

    def record(self, line: dict[str, Any], state: State) -> None:
        """Take a round down in metrics.jsonl; from here on `state` is the last whole one."""
        with self.writing():
            append_json_line(self.folder / METRICS_FILE, line)
        self.metrics.append(line)
        self.state = state
        number = state.round_number
        in_turn = number % self.config.train.save_every_round == 0 or number == self.config.num_rounds
        if in_turn or self.best == number:
            self.spare |= set() if in_turn else {number}
            with self.writing():
                self.save_checkpoint()

    def charge(self) -> None:
        """Count the bytes of a round that was given up to the one before it."""
        for way, spent in self.clients.take_traffic().items():
            self.metrics[-1][way] += spent
        with self.writing():
            self.write_metrics()

    def write_metrics(self) -> None:
        write_whole(self.folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in self.metrics))

    @property
    def best(self) -> int | None:
        """The round with the best adapter, if that was measured: of clients alone, each has another."""
        return None if self.config.baseline == "alone" else best_round(self.metrics)

    def no_better(self) -> str | None:
        """Why the run ends here, by `train.early_stop_rounds`; None if it goes on, or it is no round to measure."""
        config, number, losses = self.config, self.state.round_number, held_out_losses(self.metrics)
        due = bool(config.sampling.fraction_evaluate) or config.evaluates_after(number)
        best = min(losses, key=losses.__getitem__, default=number)
        if config.train.early_stop_rounds is None or not due or number - best < config.train.early_stop_rounds:
            return None
        when = f"after round {best}" if best else "before the first round"
        return f"train.early_stop_rounds={config.train.early_stop_rounds}: the held-out loss was lowest {when}"

    def afford(self, round_number: int, num_training: int) -> None:
        """Raise BudgetSpent if so many clients cannot train any more, and others evaluate what comes of it."""
        wanted = self.round_bytes(round_number, num_training)
        if wanted > self.budget_left():
            raise BudgetSpent(
                f"strategy.max_bytes={self.config.sampling.max_bytes:.10g}: {self.budget_left():.10g} bytes are left, "
                f"round {round_number} would take {wanted}"
            )

    def round_bytes(self, round_number: int, num_training: int) -> int:
        """Bytes of a round in which no client fails."""
        evaluating = self.config.evaluations_after(round_number, len(self.clients.nodes))
        return self.payload_bytes * (2 * num_training + evaluating)

    def num_training(self) -> int:
        """Clients that train in a round: `fraction_fit` of those that are there, and no fewer than are needed."""
        sampling, here = self.config.sampling, len(self.clients.nodes)
        return min(here, max(1, sampling.min_replies, share_of(here, sampling.fraction_fit)))

    def budget_left(self) -> float:
        """Bytes of `strategy.max_bytes` that no round has used so far."""
        most = self.config.sampling.max_bytes
        spent = sum(line["bytes_down"] + line["bytes_up"] for line in self.metrics)
        return float("inf") if most is None else most - spent - sum(self.clients.traffic.values())

    def collect(self, round_number: int, learning_rate: float) -> tuple[list[tuple[int, Message]], dict[int, str], int]:
        """Let clients train until `min_replies` replies are good; returns these by client, and what was dropped.

        Raises:
            SettingsError: if all clients say the same that has to be changed.
            RunError: if too few are good after `round_retries` more trials, with the first client's own traceback.
        """
        sampling = self.config.sampling
        good: dict[int, Message] = {}
        dropped: dict[int, str] = {}
        self.norms = {}
        for trial in range(sampling.round_retries + 1):
            self.clients.wait_for(sampling.min_replies, sampling.round_timeout_s)
            chosen = self.choose("train", round_number, self.num_training(), trial, good, dropped)
            self.afford(round_number, len(chosen))
            messages = self.messages(
                "train", round_number, chosen, self.state.adapter, **{"learning-rate": learning_rate}
            )
            replies = self.clients.exchange(messages)
            if not (good or trial):
                raise_shared_refusal(replies.values(), len(chosen))
            self.accept(round_number, chosen, replies, good, dropped)
            if len(good) >= sampling.min_replies:
                return sorted(good.items()), dropped, trial
            if trial < sampling.round_retries:
                self.progress.warn(
                    f"round {round_number}: {len(good)} good replies, {sampling.min_replies} are needed: other clients "
                    "are asked"
                )
        partition, fault = next(iter(dropped.items()), ("", "nothing"))
        raise RunError(
            f"round {round_number}: {len(good) or 'not one'} valid {'reply' if len(good) < 2 else 'replies'} "
            f"from clients {sorted([*good, *dropped])}, strategy.min_replies={sampling.min_replies}; "
            f"client {partition} says:\n{fault}"
        )

    def choose(
        self,
        purpose: str,
        round_number: int,
        count: int,
        trial: int = 0,
        good: Iterable[int] = (),
        dropped: Iterable[int] = (),
    ) -> list[int]:
        """The partition ids of `count` clients that take part, of those that are there.

        In a further trial, as many as are missing behind the `good` ones: such as were not `dropped`, if there are.
        """
        here, key = set(self.clients.nodes), (purpose, self.config.seed, round_number)
        count = min(count, len(here))
        if not trial:
            return sample(here, count, *key)
        others, missing = here - set(good), count - len(set(good))
        fresh = others - set(dropped)
        chosen = sample(fresh, min(missing, len(fresh)), *key, trial)
        again = others - fresh
        return sorted(chosen + sample(again, min(missing - len(chosen), len(again)), *key, trial, "again"))

    def aggregate(self, round_number: int, replies: Sequence[Message]) -> Adapter:
        """The next adapter, as the strategy makes it.

        Raises:
            RunError: if it makes none, or not one of finite numbers.
        """
        name = type(self.strategy).__name__
        try:
            arrays, _ = self.strategy.aggregate_train(round_number, replies)
        except Exception as error:
            log.exception("%s", name)
            raise RunError(f"round {round_number}: {name} cannot aggregate {len(replies)} replies: {error}") from error
        if arrays is None:
            raise RunError(f"round {round_number}: {name} made no adapter of {len(replies)} replies")
        adapter = {tensor: arrays[tensor].numpy().astype(np.float32) for tensor in sorted(self.shapes)}
        if not all(np.isfinite(value).all() for value in adapter.values()):
            raise RunError(f"round {round_number}: {name} made an adapter of numbers that are not finite")
        return adapter

    def messages(
        self, purpose: str, round_number: int, chosen: Sequence[int], adapter: Adapter, **settings: Any
    ) -> list[Message]:
        """The strategy's messages to the `chosen` clients, each with the position in that client's own data.

        Args:
            purpose: `train` or `evaluate`.
            settings: for the clients' config, beside what the strategy puts there.
        """
        partition_of = {self.clients.nodes[partition]: partition for partition in chosen}
        configure = {"train": self.strategy.configure_train, "evaluate": self.strategy.configure_evaluate}[purpose]
        arrays, shown = to_record(adapter), cast(Any, ShownNodes(self.clients.grid, list(partition_of)))
        packed: dict[int, tuple[ArrayRecord, Adapter]] = {}  # one for all messages that share their arrays
        messages = []
        for message in list(configure(round_number, arrays, ConfigRecord(settings), shown)):  # a list: ids must stay
            record, node = message.content.array_records["arrays"], message.metadata.dst_node_id
            if id(record) not in packed:
                packed[id(record)] = self.packed(record)
            partition = partition_of[node]
            sent, self.sent[partition] = packed[id(record)]
            own: dict[str, Any] = {
                "first-row": self.state.rows_seen.get(partition, 0),
                "server-round": round_number,
            }
            if self.config.transfer != "fp32":
                own["initial-sha256"] = self.initial_sha256
            config = ConfigRecord(dict(message.content.config_records["config"]) | own)
            content = RecordDict(dict(message.content) | {"arrays": sent, "config": config})
            messages.append(Message(content, node, purpose, ttl=self.clients.timeout_s))
        return messages

    def packed(self, arrays: ArrayRecord) -> tuple[ArrayRecord, Adapter]:
        """A strategy's adapter in the form in which it travels, and itself."""
        adapter = {name: array.numpy() for name, array in arrays.items()}
        if self.config.transfer == "fp32":
            return arrays, adapter
        return to_record(transfer.encode(adapter, self.initial, self.config.transfer)), adapter

    @functools.cached_property
    def initial_sha256(self) -> str:
        return transfer.digest(self.initial)

    def unpacked(self, partition: int, reply: Message) -> Message:
        """`reply` with its adapter in float32; a reply without a usable one stays as it is, for the guard.

        Raises:
            ValueError: if it holds no difference from the adapter that was sent.
        """
        records = list(reply.content.array_records.values()) if reply.has_content() else []
        if self.config.transfer == "fp32" or len(records) != 1:
            return reply
        arrays = {name: array.numpy() for name, array in records[0].items()}
        adapter = transfer.decode(arrays, self.sent[partition], self.config.transfer)
        reply.content.array_records[next(iter(reply.content.array_records))] = to_record(adapter)
        return reply

    def accept(
        self,
        round_number: int,
        chosen: Sequence[int],
        replies: Mapping[int, Message],
        good: dict[int, Message],
        dropped: dict[int, str],
    ) -> None:
        """Put the replies that can be aggregated into `good`; the others are named, and noted in `dropped`."""
        faults = {}
        for partition in chosen:
            reply = replies.get(self.clients.nodes[partition])
            fault = self.fault_of(partition, reply) if reply else f"no reply in {self.clients.timeout_s:g}s"
            if fault:
                faults[partition] = fault
            elif reply:
                good[partition] = reply
                self.norms[partition] = update_norm(reply, self.sent[partition])
                dropped.pop(partition, None)  # in an earlier trial
        earlier = [norm for line in self.metrics[-NORM_ROUNDS:] for norm in line["update_norms"].values()]
        faults |= outliers(self.norms, earlier, self.config.sampling.max_norm_ratio)
        for partition, fault in faults.items():
            good.pop(partition, None)
            self.norms.pop(partition, None)
            dropped[partition] = fault
            self.blame(round_number, partition, "is left out", fault)

    def blame(self, round_number: int, partition: int, what: str, fault: str) -> None:
        """Name a client's fault: whole in the log, its last line to the user."""
        log.error("round %s: client %s %s: %s", round_number, partition, what, fault)
        self.progress.warn(f"round {round_number}: client {partition} {what}: {last_line(fault)}")

    def fault_of(self, partition: int, reply: Message) -> str | None:
        """Why a reply cannot be aggregated, or None; then its adapter is in float32."""
        try:
            return check_reply(self.unpacked(partition, reply), self.shapes, self.clients.num_rows[partition])
        except Exception as error:  # its arrays may be anything
            return f"its adapter cannot be read: {error}"

    def account(self, good: Sequence[tuple[int, Message]], rows_seen: dict[int, int]) -> dict[str, Any]:
        """What the round did, from the replies that count; also moves the clients' positions in `rows_seen` on."""
        reports = {partition: metrics_of(reply) for partition, reply in good}
        weights = {partition: report["num-examples"] for partition, report in reports.items()}
        for partition, report in reports.items():
            if partition not in rows_seen and report["without_response"]:
                self.progress.warn(
                    f"client {partition}: {report['without_response']} rows without a response are left out"
                )
            rows_seen[partition] = rows_seen.get(partition, 0) + int(report["rows"])

        def total(name: str) -> int:
            return int(sum(report[name] for report in reports.values()))

        return {
            "train_loss": sum(weights[p] * reports[p]["train_loss"] for p in reports) / sum(weights.values()),
            "clients": list(reports),
            "num_examples": weights,
            "rows_used": {p: int(min(rows_seen[p], weights[p])) for p in reports},
            **{name: total(name) for name in TOTALS},
            "processes": sorted({process_of(reply) for _, reply in good}),
            "peak_memory_bytes": int(max(report["peak_memory_bytes"] for report in reports.values())),
            "server_peak_memory_bytes": peak_resident_bytes(),
            "seconds": {part[:-2]: sum(report[part] for report in reports.values()) for part in PARTS},
        }

    def evaluate(self, round_number: int, adapter: Adapter) -> dict[str, Any]:
        """What held-out rows say of `adapter`: those of some clients, and those of everybody, if it is their turn."""
        config, found = self.config, dict[str, dict[str, Any]]()
        if share := config.sampling.fraction_evaluate:
            chosen = self.choose("evaluate", round_number, max(1, share_of(len(self.clients.nodes), share)))
            scores, answered = self.scores(round_number, adapter, chosen, "own")
            if not scores:
                self.progress.warn(f"round {round_number}: no client had rows to evaluate on; raise dataset.holdout")
            found["clients"] = figures(scores) | {"clients": answered}
        if config.evaluates_after(round_number) or self.is_last(round_number):
            count, dropped = config.evaluators_after(round_number), set[int]()
            for trial in range(config.sampling.round_retries + 1):
                chosen = self.choose("global", round_number, count, trial, (), dropped)
                scores, _ = self.scores(round_number, adapter, chosen, "global")
                dropped |= set(chosen)
                if scores or count * self.payload_bytes > self.budget_left():
                    break
            found["global"] = figures(scores)
        return {name: values for name, values in found.items() if "loss" in values}

    def is_last(self, round_number: int) -> bool:
        """Whether this round's adapter is the final one for want of bytes, and there are enough left to measure it."""
        left = self.budget_left()
        after_it = self.round_bytes(round_number + 1, self.num_training())
        return bool(self.config.dataset.eval_name) and round_number > 0 and self.payload_bytes <= left < after_it

    def scores(self, round_number: int, adapter: Adapter, chosen: Sequence[int], rows: str) -> tuple[Scores, list[int]]:
        """The scores that the `chosen` clients give on their `own` rows or the `global` ones, and who answered."""
        replies = self.clients.exchange(self.messages("evaluate", round_number, chosen, adapter, rows=rows))
        if not round_number:
            raise_shared_refusal(replies.values(), len(chosen))
        good = {}
        for partition in chosen:
            reply = replies.get(self.clients.nodes[partition])
            fault = (
                self.fault_of_scores(partition, reply, rows) if reply else f"no reply in {self.clients.timeout_s:g}s"
            )
            if fault:
                self.blame(round_number, partition, "could not evaluate", fault)
            elif reply:
                good[partition] = reply
        return scores_of(list(good.values())), list(good)

    def fault_of_scores(self, partition: int, reply: Message, rows: str) -> str | None:
        """Why scores cannot be used: a client's are of no more tokens than it has, those of everybody's of as many."""
        if rows == "own":
            return check_scores(reply, 0, self.clients.num_rows[partition] * self.config.train.seq_length)
        fault = check_scores(reply, self.global_tokens or 1, self.global_tokens or MOST)
        if fault is None:
            self.global_tokens = tokens_of(reply)
        return fault

    def save_checkpoint(self) -> None:
        """Write `peft_<round>/`, and remove the oldest beyond `train.keep_checkpoints`."""
        facts = {"quantization": self.config.model.quantization}

        def card(folder: Path) -> None:
            write_card(folder, self.config, self.lora, self.metrics, self.clients.own_data)

        checkpoint.save(self.folder, self.state, self.lora, self.template, facts, card)
        self.saved = self.state.round_number
        checkpoint.prune(self.folder, self.config.train.keep_checkpoints, self.best, self.spare)
        checkpoint.point_to(self.folder, self.best)

    def save_last_round(self) -> None:
        """When the run ends early: keep the last whole round, unless it is on disk."""
        if self.saved == self.state.round_number:
            return
        try:
            with stopping.held(), self.writing():
                self.save_checkpoint()
        except RunError as error:
            self.progress.warn(f"round {self.state.round_number} is not kept: {error}")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What goes wrong with the run folder, in one line."""
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError("it was removed")
            yield
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.folder}: results cannot be written ({error})") from error

    def restore(self) -> None:
        """Go on behind the newest whole checkpoint: state, strategy and metrics are as they were then.

        Raises:
            SettingsError: if the strategy's own state cannot be restored.
        """
        metrics = read_json_lines(self.folder / METRICS_FILE)
        whole = next((n for n, line in enumerate(metrics) if line.get("round") != n + 1), len(metrics))
        try:
            state = checkpoint.newest(self.folder, self.strategy, self.shapes, whole, self.progress.warn)
        except OSError as error:
            raise RunError(f"{self.folder}: a checkpoint cannot be read ({error})") from error
        if state is None and rounds_in(self.folder):
            raise SettingsError(
                f"resume={self.folder}: {METRICS_FILE} lacks round {whole + 1}, which all checkpoints need; "
                "put it back, or start again in another folder"
            )
        self.state = state or self.state
        self.saved, self.metrics = self.state.round_number, metrics[: self.state.round_number]
        most, sent = self.config.sampling.max_bytes, totals_so_far(self.metrics)
        if most is not None and sent and (spent := sent["bytes_down"] + sent["bytes_up"]) > most:
            raise SettingsError(f"strategy.max_bytes={most:.10g}: this run has sent {spent} bytes already; use more")
        with self.writing():
            for number in rounds_in(self.folder):
                if number > self.saved:  # of rounds whose metrics are lost: they are done again
                    shutil.rmtree(folder_of(self.folder, number))
            self.write_metrics()
            (self.folder / RESULTS_FILE).unlink(missing_ok=True)  # of a run that was ended early
        log.info("going on after round %s", self.saved)
        self.progress.going_on(self.saved)

    def summarize(self, ended: str | None) -> dict[str, Any]:
        """Write the last checkpoint, train_loss.png and results.json; returns the last.

        Args:
            ended: why there are no more rounds, if there could be.
        """
        if self.saved != self.state.round_number:
            with self.writing():
                self.save_checkpoint()
        examples = {int(p): rows for line in self.metrics for p, rows in line["num_examples"].items()}
        used = {p: int(min(seen, examples[p])) for p, seen in sorted(self.state.rows_seen.items())}
        folder = folder_of(self.folder, self.state.round_number)
        summary = totals_so_far(self.metrics) | {
            "clients_used": len(used),
            "rows_used": sum(used.values()),
            "rows_used_by_client": used,
            "rows_trained": sum(self.state.rows_seen.values()),
            "optimizer_steps": sum(self.state.rows_seen.values()) // self.config.batch_size,
            "tokens": sum(line["tokens"] for line in self.metrics),
            "processes": len({process for line in self.metrics for process in line["processes"]}),
            "model_loads": sum(line["model_loads"] for line in self.metrics),
            "tokenizations": sum(line["tokenizations"] for line in self.metrics),
            "dropped": sum(len(line["dropped"]) for line in self.metrics),
            "server_peak_memory_bytes": self.metrics[-1]["server_peak_memory_bytes"],
            "seconds": round(self.state.elapsed_s + self.waited_s, 3),
            "ended": ended,
            **self.facts,
            "adapter": folder.name,
            "adapter_sha256": file_sha256(folder / adapters.ADAPTER_FILE),
        }
        with self.writing():
            title = f"{self.config.model.name}, {self.config.num_clients} clients"
            plot_loss(self.metrics, self.folder / PLOT_FILE, title)
            write_json(self.folder / RESULTS_FILE, summary)  # last: it says that the run is complete
        return summary


def raise_shared_refusal(replies: Iterable[Message], count: int) -> None:
    """End the run if all of `count` clients name the same thing to change: no other try or client would help.

    Raises:
        SettingsError: with what they say.
    """
    errors = [reply.error for reply in replies if reply.has_error()]
    reasons = [str(error.reason) for error in errors if error.code == SETTINGS_ERROR]
    if len(reasons) == count and len(set(reasons)) == 1:
        raise SettingsError(reasons[0])


def busiest_process(good: Sequence[tuple[int, Message]]) -> float:
    """Seconds that the busiest worker process worked: the part of a round that no engine could save."""
    busy: dict[str, float] = defaultdict(float)
    for _, reply in good:
        busy[process_of(reply)] += float(metrics_of(reply)["total_s"])
    return max(busy.values())
