"""The server's side of a round: sample clients, check replies, aggregate, evaluate, record.

The round loop is ours and the arithmetic is Flower's: a strategy's `configure_train` and
`aggregate_train` are called as Flower's own loop calls them, but which clients take part is drawn
from (seed, round) by partition id, because Flower's node ids are random in every run.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

import model as adapters
from exchange import transfer
from exchange.clients import Clients, Progress, last_line
from exchange.faults import SETTINGS_ERROR
from exchange.guard import (
    MEMORY,
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
from exchange.scores import Scores, figures
from exchange.transfer import Codec, to_record
from model import Adapter
from runs import checkpoint
from runs.checkpoint import State
from runs.record import Record
from server import sites
from server.handover import hand_over
from server.limits import Budget, BudgetSpent, no_better
from server.sampling import choose, num_training
from server.strategies import ShownNodes, aggregate, make_strategy
from settings.schema import RunConfig, RunError, SettingsError, check_budget, share_of
from utils import cosine_learning_rate, peak_resident_bytes

log = logging.getLogger(__name__)

NORM_ROUNDS = 5  # rounds whose updates say what size is ordinary


@dataclass(frozen=True)
class Trained:
    """What a round's training gave, by partition id."""

    good: Mapping[int, Message] = field(default_factory=dict)
    """Replies that count, their adapters in float32."""
    norms: Mapping[int, float] = field(default_factory=dict)
    """Sizes of their updates."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Clients that are left out, and why."""
    retries: int = 0

    @property
    def replies(self) -> list[tuple[int, Message]]:
        return sorted(self.good.items())


class Federation:
    """One run, from asking the clients who they are to the last checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        template: str,
        progress: Progress,
        facts: Mapping[str, Any] | None = None,  # more for results.json
    ) -> None:
        self.config, self.progress, self.facts = config, progress, facts or {}
        self.strategy = make_strategy(config)
        lora, self.shapes = adapters.adapter_plan(config.model, adapters.read_config(config.model))
        initial = adapters.initial_adapter(self.shapes, lora, config.seed)
        self.record = Record(config, folder, template, lora, progress.warn)
        self.record.start(initial)
        self.codec = Codec(config.transfer, initial)
        self.budget = Budget(config, transfer.payload_bytes(self.shapes, config.transfer))
        self.whole_bytes = transfer.payload_bytes(self.shapes, "fp32")
        once_bytes = adapters.starts_from_base(self.shapes) * self.whole_bytes
        check_budget(config, self.budget.payload_bytes, once_bytes)
        self.clients: Clients  # from the start of `run` on
        self.global_tokens: float | None = None  # of dataset.eval_name, by the first who counted them

    def restore(self) -> None:
        """Resume from the newest whole checkpoint in the run's folder. Raises as `Record.restore`."""
        self.record.restore(self.strategy, self.shapes)
        self.progress.resumed(self.record.saved)

    def run(self, grid: Grid) -> dict[str, Any]:
        """All rounds that are left; returns the summary that results.json holds.

        However it ends, the last whole round has a checkpoint. It ends early when held-out rows say that it no longer
        improves (`train.early_stop_rounds`), or when the next round would cost too much (`strategy.max_bytes`).

        Raises:
            SettingsError: if what the clients say has to be changed.
            RunError: if a round has too few valid replies, or results cannot be written.
        """
        started, record = time.perf_counter(), self.record
        self.progress.say("waiting for the clients")
        try:
            timeout_s, known = self.config.sampling.round_timeout_s, sites.noted(record.folder)
            self.clients = Clients(grid, timeout_s, self.progress, known, self.whole_bytes)
            self.wait_for(self.config.num_clients)
            self.clients.strict = False
            self.complete_adapter()
            waited_s = time.perf_counter() - started
            try:
                ended = self.play_rounds()
            except BudgetSpent as spent:
                if not record.state.round_number:
                    raise RunError(str(spent)) from spent
                ended = str(spent)
                record.charge(self.clients.take_traffic())
            summary = record.finish({"ended": ended, **self.facts}, waited_s)
            hand_over(self.clients, record, summary, self.config.sampling.final_wait_s)
            return summary
        except BaseException:
            record.keep_last_round()
            raise

    def wait_for(self, at_least: int, timeout_s: float = float("inf")) -> None:
        """As `Clients.wait_for`; who has which partition is noted, for a resume."""
        self.clients.wait_for(at_least, timeout_s)
        sites.note(self.record.folder, self.clients.sites)

    def complete_adapter(self) -> None:
        """Fetch from one client the tensors whose first values depend on the base weights (DoRA's magnitudes)."""
        known = self.codec.initial
        if set(known) == set(self.shapes):
            return
        ask = Message(RecordDict(), self.clients.nodes[min(self.clients.nodes)], f"{MessageType.QUERY}.initial_adapter")
        replies = list(self.clients.exchange([ask]).values())
        raise_shared_refusal(replies, 1)
        fault = check_adapter(replies[0], self.shapes) if replies else self.clients.silence
        if fault:
            raise RunError(f"no initial adapter: {fault}")
        received: Any = replies[0].content["arrays"]
        self.codec.initial = dict(sorted(({name: received[name].numpy() for name in self.shapes} | known).items()))
        if not self.record.state.round_number:
            self.record.start(self.codec.initial)
        else:
            self.clients.take_traffic()  # the first round has it already

    def play_rounds(self) -> str | None:
        """The rounds that are left; why there are no more, if there could be."""
        record, last = self.record, self.config.num_rounds
        before = {} if record.state.round_number else self.evaluate(0, record.state.adapter)
        while (number := record.state.round_number) < last:
            if ended := no_better(self.config, number, record.metrics):
                return ended
            self.play_round(number + 1, before if number == 0 else {})
        return None

    def play_round(self, round_number: int, before: Mapping[str, Any]) -> None:
        """Sample, train, check, aggregate, evaluate, record.

        Args:
            before: what the held-out rows said before the first round, to be recorded with it.
        """
        start, train, state = time.perf_counter(), self.config.train, self.record.state
        learning_rate = cosine_learning_rate(
            round_number, self.config.num_rounds, train.learning_rate_max, train.learning_rate_min
        )
        trained = self.collect(round_number, learning_rate)
        aggregating = time.perf_counter()
        adapter = aggregate(self.strategy, round_number, trained.replies, self.shapes)
        aggregated = time.perf_counter()
        for partition, what in rows_left_out(trained, state.rows_seen):
            self.progress.warn(f"{self.clients.label(partition)}: {what}")
        rows_seen = positions_after(state.rows_seen, trained.good)
        line: dict[str, Any] = {"round": round_number, "learning_rate": learning_rate}
        line |= account(trained.replies, rows_seen)
        line |= {"dropped": trained.dropped, "retries": trained.retries, "update_norms": trained.norms}
        line |= {"held_out_before": before} if before else {}
        line |= {"held_out": found} if (found := self.evaluate(round_number, adapter)) else {}
        line |= self.clients.take_traffic()
        line["seconds"] |= {
            "transfer": max(0.0, aggregating - start - busiest_process(trained.replies)),
            "aggregate": aggregated - aggregating,
            "wall": (wall := time.perf_counter() - start),
        }
        kept = checkpoint.strategy_state(self.strategy)
        self.record.own_data = self.clients.own_data
        self.record.add(line, State(adapter, round_number, rows_seen, state.elapsed_s + wall, kept))
        self.progress.round_done(line)

    def collect(self, round_number: int, learning_rate: float) -> Trained:
        """Let clients train until `min_replies` replies are good.

        Raises:
            SettingsError: if all clients say the same that has to be changed.
            RunError: if too few are good after `round_retries` more trials, with the first client's own traceback.
        """
        sampling, key, trained = self.config.sampling, ("train", self.config.seed, round_number), Trained()
        for trial in range(sampling.round_retries + 1):
            self.wait_for(sampling.min_replies, sampling.round_timeout_s)
            here = self.clients.nodes
            count = num_training(self.config, len(here))
            chosen = choose(here, count, *key, trial=trial, good=trained.good, dropped=trained.dropped)
            self.budget.check(round_number, len(here), len(chosen), self.bytes_left())
            adapter, settings = self.record.state.adapter, {"learning-rate": learning_rate}
            replies = self.clients.exchange(self.messages("train", round_number, chosen, adapter, **settings))
            if not trial:
                raise_shared_refusal(replies.values(), len(chosen))
            trained = replace(self.accept(round_number, chosen, replies, trained), retries=trial)
            if len(trained.good) >= sampling.min_replies:
                return trained
            if trial < sampling.round_retries:
                self.progress.warn(
                    f"round {round_number}: {len(trained.good)} good replies, {sampling.min_replies} are needed: other "
                    "clients are asked"
                )
        raise RunError(too_few(round_number, trained, sampling.min_replies, self.clients.label))

    def messages(
        self, purpose: str, round_number: int, chosen: Sequence[int], adapter: Adapter, **settings: Any
    ) -> list[Message]:
        """The strategy's messages to the `chosen` clients, each with the position in that client's own data.

        Args:
            purpose: `train` or `evaluate`.
            settings: for the clients' config, beside what the strategy puts there.
        """
        configure = {"train": self.strategy.configure_train, "evaluate": self.strategy.configure_evaluate}[purpose]
        arrays, shown = to_record(adapter), cast(Any, ShownNodes(self.clients.grid, chosen))
        packed: dict[int, tuple[ArrayRecord, Adapter]] = {}  # one for all messages that share their arrays
        messages = []
        for message in list(configure(round_number, arrays, ConfigRecord(settings), shown)):  # a list keeps ids
            record, partition = message.content.array_records["arrays"], message.metadata.dst_node_id
            if id(record) not in packed:
                packed[id(record)] = self.codec.pack(record)
            sent, self.codec.sent[partition] = packed[id(record)]
            own = {"first-row": self.record.state.rows_seen.get(partition, 0), "server-round": round_number}
            config = ConfigRecord(dict(message.content.config_records["config"]) | own | self.codec.facts)
            content = RecordDict(dict(message.content) | {"arrays": sent, "config": config})
            messages.append(Message(content, self.clients.nodes[partition], purpose, ttl=self.clients.ttl_s))
        return messages

    def accept(
        self, round_number: int, chosen: Sequence[int], replies: Mapping[int, Message], before: Trained
    ) -> Trained:
        """What earlier trials gave, with the replies that can be aggregated; the others are named, and left out."""
        good, norms, faults = dict(before.good), dict(before.norms), {}
        for partition in chosen:
            reply = replies.get(self.clients.nodes[partition])
            fault = self.fault_of(partition, reply) if reply else self.clients.silence
            if fault:
                faults[partition] = fault
            elif reply:
                good[partition] = reply
                norms[partition] = update_norm(reply, self.codec.sent[partition])
        earlier = [norm for line in self.record.metrics[-NORM_ROUNDS:] for norm in line["update_norms"].values()]
        faults |= outliers(norms, earlier, self.config.sampling.max_norm_ratio)
        for partition, fault in faults.items():
            self.blame(round_number, partition, "is left out", fault)
        dropped = {partition: fault for partition, fault in before.dropped.items() if partition not in good} | faults
        return Trained(without(good, faults), without(norms, faults), dropped)

    def fault_of(self, partition: int, reply: Message) -> str | None:
        """Why a reply cannot be aggregated, or None; then its adapter is in float32."""
        try:
            return check_reply(self.codec.unpack(partition, reply), self.shapes, self.clients.num_rows[partition])
        except Exception as error:  # its arrays may be anything
            return f"its adapter cannot be read: {error}"

    def blame(self, round_number: int, partition: int, what: str, fault: str) -> None:
        """Name a client's fault: whole in the log, its last line to the user."""
        who = self.clients.label(partition)
        log.error("round %s: %s %s: %s", round_number, who, what, fault)
        self.progress.warn(f"round {round_number}: {who} {what}: {last_line(fault)}")

    def bytes_left(self) -> float:
        """Bytes of `strategy.max_bytes` that are left."""
        return self.budget.left(self.record.metrics, self.clients.traffic)

    def evaluate(self, round_number: int, adapter: Adapter) -> dict[str, Any]:
        """What held-out rows say of `adapter`: those of some clients, and those of everybody, if it is their turn."""
        config, found, here = self.config, dict[str, dict[str, Any]](), self.clients.nodes
        if share := config.sampling.fraction_evaluate:
            count = max(1, share_of(len(here), share))
            chosen = choose(here, count, "evaluate", config.seed, round_number)
            scores, answered = self.scores(round_number, adapter, chosen, "own")
            if not scores:
                self.progress.warn(f"round {round_number}: no client had rows to evaluate on; raise dataset.holdout")
            found["clients"] = figures(scores) | {"clients": answered}
        if config.evaluates_after(round_number) or self.budget.ends_after(round_number, len(here), self.bytes_left()):
            found["global"] = figures(self.global_scores(round_number, adapter))
        return {name: values for name, values in found.items() if "loss" in values}

    def global_scores(self, round_number: int, adapter: Adapter) -> Scores:
        """The scores on `dataset.eval_name`: of a client with rows of its own for it, or of any if none has such."""
        config, scores, asked = self.config, Scores(), set[int]()
        count, own = config.evaluators_after(round_number), self.clients.with_own_eval()
        for trial in range(config.sampling.round_retries + 1):
            key = ("global", config.seed, round_number)
            if own:
                chosen = [partition for partition in own if partition not in asked][:count] or own[:count]
            else:
                chosen = choose(self.clients.nodes, count, *key, trial=trial, dropped=asked)
            scores, _ = self.scores(round_number, adapter, chosen, "global")
            asked |= set(chosen)
            if scores or count * self.budget.payload_bytes > self.bytes_left():
                break
        return scores

    def scores(self, round_number: int, adapter: Adapter, chosen: Sequence[int], rows: str) -> tuple[Scores, list[int]]:
        """The scores that the `chosen` clients give on their `own` rows or the `global` ones, and who answered."""
        replies = self.clients.exchange(self.messages("evaluate", round_number, chosen, adapter, rows=rows))
        if not round_number:
            raise_shared_refusal(replies.values(), len(chosen))
        good = {}
        for partition in chosen:
            reply = replies.get(self.clients.nodes[partition])
            fault = self.fault_of_scores(partition, reply, rows) if reply else self.clients.silence
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


def without(values: Mapping[int, Any], left_out: Container[int]) -> dict[int, Any]:
    return {partition: value for partition, value in values.items() if partition not in left_out}


def too_few(round_number: int, trained: Trained, needed: int, label: Callable[[int], str]) -> str:
    """Why a round ends the run: how many replies were good, and what the first client said whose was not."""
    good, (partition, fault) = len(trained.good), next(iter(trained.dropped.items()), (-1, "nothing"))
    return (
        f"round {round_number}: {good or 'not one'} valid {'reply' if good < 2 else 'replies'} "
        f"from clients {sorted([*trained.good, *trained.dropped])}, strategy.min_replies={needed}; "
        f"{label(partition)} says:\n{fault}"
    )


def rows_left_out(trained: Trained, rows_seen: Mapping[int, int]) -> Iterator[tuple[int, str]]:
    """What clients leave out of their rows, of each once: when it trains for the first time."""
    whys = {"without_response": "rows without a response", "refused": "rows that the chat template refuses"}
    for partition, reply in trained.replies:
        for key, what in whys.items():
            count = metrics_of(reply)[key]
            if count and partition not in rows_seen:
                yield partition, f"{count} {what} are left out"


def positions_after(rows_seen: Mapping[int, int], good: Mapping[int, Message]) -> dict[int, int]:
    """The clients' positions in their own data, moved on by the rows that they used."""
    used = {partition: int(metrics_of(reply)["rows"]) for partition, reply in sorted(good.items())}
    return {**rows_seen, **{partition: rows_seen.get(partition, 0) + rows for partition, rows in used.items()}}


def account(good: Sequence[tuple[int, Message]], rows_seen: Mapping[int, int]) -> dict[str, Any]:
    """What a round did, from the replies that count.

    Args:
        rows_seen: the clients' positions after it.
    """
    reports = {partition: metrics_of(reply) for partition, reply in good}
    weights = {partition: report["num-examples"] for partition, report in reports.items()}

    def total(name: str) -> int:
        return int(sum(report[name] for report in reports.values()))

    return {
        "train_loss": sum(weights[p] * reports[p]["train_loss"] for p in reports) / sum(weights.values()),
        "clients": list(reports),
        "num_examples": weights,
        "rows_used": {p: int(min(rows_seen[p], weights[p])) for p in reports},
        **{name: total(name) for name in TOTALS},
        "processes": sorted({process_of(reply) for _, reply in good}),
        **{name: int(max(report[name] for report in reports.values())) for name in MEMORY},
        "server_peak_memory_bytes": peak_resident_bytes(),
        "seconds": {part[:-2]: sum(report[part] for report in reports.values()) for part in PARTS},
    }


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
