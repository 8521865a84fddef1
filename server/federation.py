"""The server's side of a round: sample clients, check replies, aggregate, evaluate, record.

The round loop is ours and the arithmetic is Flower's: a strategy's `configure_train` and `aggregate_train` are called
as Flower's own loop calls them, but which clients take part is drawn from (seed, round) by partition id.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

import model as adapters
from exchange import guard, transfer
from exchange.clients import Clients, Progress, last_line
from exchange.faults import SETTINGS_ERROR
from exchange.guard import metrics_of, process_of
from exchange.scores import Scores, figures
from exchange.transfer import Codec, arrays_of, to_record
from model import Adapter
from runs import checkpoint
from runs.checkpoint import State
from runs.record import Record
from server import sites
from server.sampling import Budget, BudgetSpent, choose, no_better, num_training
from server.strategies import aggregate, make_strategy
from settings.schema import RunConfig, RunError, SettingsError, check_budget, share_of
from utils import cosine_learning_rate, peak_resident_bytes

log = logging.getLogger(__name__)

NORM_ROUNDS = 5  # rounds whose updates say what size is ordinary


@dataclass(frozen=True)
class Trained:
    """What a round's training gave, by partition id: replies that count, their adapters in float32, with the sizes of
    their updates; who is left out, and why."""

    good: Mapping[int, Message] = field(default_factory=dict)
    norms: Mapping[int, float] = field(default_factory=dict)
    dropped: Mapping[int, str] = field(default_factory=dict)
    retries: int = 0

    @property
    def replies(self) -> list[tuple[int, Message]]:
        return sorted(self.good.items())


class Federation:
    """One run, from asking the clients who they are to the last checkpoint."""

    def __init__(self, config: RunConfig, folder: Path, template: str, progress: Progress) -> None:
        self.config, self.progress = config, progress
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
        """Resume from the newest whole checkpoint. Raises as `Record.restore`."""
        self.record.restore(self.strategy, self.shapes)
        self.progress.resumed(self.record.saved)

    def run(self, grid: Grid, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All rounds that are left; returns the summary that results.json holds, with `facts`.

        However it ends, the last whole round has a checkpoint.

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
            summary = record.finish({"ended": self.play_rounds(), **(facts or {})}, waited_s)
            sites.hand_over(self.clients, record, summary, self.config.sampling.final_wait_s)
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
        [reply] = self.clients.exchange([ask]).values()
        raise_shared_refusal([reply])
        if fault := guard.check_adapter(reply, self.shapes):
            raise RunError(f"no initial adapter: {fault}")
        [received] = reply.content.array_records.values()
        self.codec.initial = dict(sorted((arrays_of(received) | known).items()))
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
            try:
                self.play_round(number + 1, before if number == 0 else {})
            except BudgetSpent as spent:
                if not number:
                    raise RunError(str(spent)) from spent
                record.charge(self.clients.take_traffic())
                return str(spent)
        return None

    def play_round(self, round_number: int, before: Mapping[str, Any]) -> None:
        """Sample, train, check, aggregate, evaluate, record.

        `before` is what held-out rows said before the first round, to be recorded with it.
        """
        start, train, state, last = time.perf_counter(), self.config.train, self.record.state, self.config.num_rounds
        learning_rate = cosine_learning_rate(round_number, last, train.learning_rate_max, train.learning_rate_min)
        trained = self.collect(round_number, learning_rate)
        aggregating = time.perf_counter()
        adapter = aggregate(self.strategy, round_number, trained.replies, state.adapter)
        aggregated = time.perf_counter()
        for partition, what in rows_left_out(trained, state.rows_seen):
            self.progress.warn(f"{self.clients.label(partition)}: {what}")
        used = {p: state.rows_seen.get(p, 0) + int(metrics_of(reply)["rows"]) for p, reply in trained.replies}
        rows_seen = {**state.rows_seen, **used}
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
            RunError: if too few are good after `round_retries`, with the first client's own traceback.
        """
        sampling, key, trained = self.config.sampling, ("train", self.config.seed, round_number), Trained()
        for retry in range(sampling.round_retries + 1):
            self.wait_for(sampling.min_replies, sampling.round_timeout_s)
            here = self.clients.nodes
            count = num_training(self.config, len(here))
            chosen = choose(here, count, *key, retry=retry, good=trained.good, dropped=trained.dropped)
            self.budget.check(round_number, len(here), len(chosen), self.bytes_left())
            adapter, settings = self.record.state.adapter, {"learning-rate": learning_rate}
            replies = self.clients.exchange(self.messages("train", round_number, chosen, adapter, **settings))
            if not retry:
                raise_shared_refusal(replies.values())
            trained = replace(self.accept(round_number, replies, trained), retries=retry)
            if len(trained.good) >= sampling.min_replies:
                return trained
            if retry < sampling.round_retries:
                few = f"{len(trained.good)} good replies, {sampling.min_replies} are needed"
                self.progress.warn(f"round {round_number}: {few}: other clients are asked")
        raise RunError(too_few(round_number, trained, sampling.min_replies, self.clients.label))

    def messages(
        self, purpose: str, round_number: int, chosen: Sequence[int], adapter: Adapter, **settings: Any
    ) -> list[Message]:
        """The strategy's messages to the `chosen` clients to `train` or `evaluate`, each with the position in that
        client's own data, and `settings` beside what the strategy puts into its config.
        """
        # all that a strategy sees of nodes: Flower's own ids are random in every run, and it may keep them
        shown = SimpleNamespace(get_node_ids=lambda: list(chosen))
        configure = getattr(self.strategy, f"configure_{purpose}")
        packed: dict[int, tuple[ArrayRecord, Adapter]] = {}  # one for all messages that share their arrays
        messages = []
        for message in list(configure(round_number, to_record(adapter), ConfigRecord(settings), shown)):  # it keeps ids
            record, partition = message.content.array_records["arrays"], message.metadata.dst_node_id
            if id(record) not in packed:
                packed[id(record)] = self.codec.pack(record)
            sent, self.codec.sent[partition] = packed[id(record)]
            own = {"first-row": self.record.state.rows_seen.get(partition, 0), "server-round": round_number}
            config = ConfigRecord(dict(message.content.config_records["config"]) | own | self.codec.facts)
            content = RecordDict(dict(message.content) | {"arrays": sent, "config": config})
            messages.append(Message(content, self.clients.nodes[partition], purpose, ttl=self.clients.ttl_s))
        return messages

    def accept(self, round_number: int, replies: Mapping[int, Message], before: Trained) -> Trained:
        """What was good before, with the replies that can be aggregated; the others are named, and left out."""
        faults = {p: fault for p, reply in replies.items() if (fault := self.fault_of(p, reply))}
        good = {**before.good, **without(replies, faults)}
        sizes = {p: guard.update_norm(good[p], self.codec.sent[p]) for p in without(replies, faults)}
        norms = {**before.norms, **sizes}
        earlier = [norm for line in self.record.metrics[-NORM_ROUNDS:] for norm in line["update_norms"].values()]
        faults |= guard.outliers(norms, earlier, self.config.sampling.max_norm_ratio)
        for partition, fault in faults.items():
            self.blame(round_number, partition, "is left out", fault)
        return Trained(without(good, faults), without(norms, faults), {**without(before.dropped, good), **faults})

    def fault_of(self, partition: int, reply: Message) -> str | None:
        """Why a reply cannot be aggregated, or None; then its adapter is in float32."""
        try:
            return guard.check_reply(self.codec.unpack(partition, reply), self.shapes, self.clients.num_rows[partition])
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
        for retry in range(config.sampling.round_retries + 1):
            key = ("global", config.seed, round_number)
            if own:
                chosen = [partition for partition in own if partition not in asked][:count] or own[:count]
            else:
                chosen = choose(self.clients.nodes, count, *key, retry=retry, dropped=asked)
            scores, _ = self.scores(round_number, adapter, chosen, "global")
            asked |= set(chosen)
            if scores or count * self.budget.payload_bytes > self.bytes_left():
                break
        return scores

    def scores(self, round_number: int, adapter: Adapter, chosen: Sequence[int], rows: str) -> tuple[Scores, list[int]]:
        """The scores that the `chosen` clients give on their `own` rows or the `global` ones, and who answered."""
        replies = self.clients.exchange(self.messages("evaluate", round_number, chosen, adapter, rows=rows))
        if not round_number:
            raise_shared_refusal(replies.values())
        faults = {p: fault for p, reply in replies.items() if (fault := self.fault_of_scores(p, reply, rows))}
        for partition, fault in faults.items():
            self.blame(round_number, partition, "could not evaluate", fault)
        good = without(replies, faults)
        return guard.scores_of(list(good.values())), list(good)

    def fault_of_scores(self, partition: int, reply: Message, rows: str) -> str | None:
        """Why scores cannot be used: a client's are of no more tokens than it has, those of everybody's of as many."""
        if rows == "own":
            return guard.check_scores(reply, 0, self.clients.num_rows[partition] * self.config.train.seq_length)
        fault = guard.check_scores(reply, self.global_tokens or 1, self.global_tokens or guard.MOST)
        if fault is None:
            self.global_tokens = guard.tokens_of(reply)
        return fault


def without(values: Mapping[int, Any], left_out: Container[int]) -> dict[int, Any]:
    return {partition: value for partition, value in values.items() if partition not in left_out}


def too_few(round_number: int, trained: Trained, needed: int, label: Callable[[int], str]) -> str:
    """Why a round ends the run: how many replies were good, and what the first client said whose was not."""
    good, faults = len(trained.good), trained.dropped.items()
    said = next((f"{label(partition)} says:\n{fault}" for partition, fault in faults), "the strategy asked no other")
    return (
        f"round {round_number}: {good or 'not one'} valid {'reply' if good < 2 else 'replies'} "
        f"from clients {sorted([*trained.good, *trained.dropped])}, strategy.min_replies={needed}; {said}"
    )


def rows_left_out(trained: Trained, rows_seen: Mapping[int, int]) -> Iterator[tuple[int, str]]:
    """What clients leave out of their rows, said of each when it trains for the first time."""
    whys = {"without_response": "rows without a response", "refused": "rows that the chat template refuses"}
    for partition, reply in trained.replies:
        for key, what in whys.items():
            count = metrics_of(reply)[key]
            if count and partition not in rows_seen:
                yield partition, f"{count} {what} are left out"


def account(good: Sequence[tuple[int, Message]], rows_seen: Mapping[int, int]) -> dict[str, Any]:
    """What a round did, from the replies that count; `rows_seen` are the clients' positions after it."""
    reports = {partition: metrics_of(reply) for partition, reply in good}
    weights = {partition: report["num-examples"] for partition, report in reports.items()}
    columns = {name: [report[name] for report in reports.values()] for name in guard.REPORT}
    return {
        "train_loss": sum(weights[p] * reports[p]["train_loss"] for p in reports) / sum(weights.values()),
        "clients": list(reports),
        "num_examples": weights,
        "rows_used": {p: int(min(rows_seen[p], weights[p])) for p in reports},
        **{name: int(sum(columns[name])) for name in guard.TOTALS},
        "processes": sorted({process_of(reply) for _, reply in good}),
        **{name: int(max(columns[name])) for name in guard.MEMORY},
        "server_peak_memory_bytes": peak_resident_bytes(),
        "seconds": {part[:-2]: sum(columns[part]) for part in guard.PARTS},
    }


def raise_shared_refusal(replies: Iterable[Message]) -> None:
    """Raise SettingsError if all clients name the same thing to change: no other try or client would help."""
    errors = [reply.error if reply.has_error() else None for reply in replies]
    said = {error.reason if error and error.code == SETTINGS_ERROR else None for error in errors}
    if len(said) == 1 and (reason := said.pop()) is not None:
        raise SettingsError(reason)


def busiest_process(good: Iterable[tuple[int, Message]]) -> float:
    """Seconds that the busiest worker process worked: the part of a round that no engine could save."""
    busy: Counter[str] = Counter()
    for _, reply in good:
        busy[process_of(reply)] += metrics_of(reply)["total_s"]
    return float(max(busy.values()))
