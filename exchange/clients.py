"""The clients as the server knows them: who is there, who each of them is, and messages to them and back."""

import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol, cast

from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from exchange.faults import CLIENT_ERROR, SETTINGS_ERROR, SILENT
from exchange.folding import folded, unfolded
from exchange.guard import MOST
from exchange.pulling import pull
from settings.schema import RunError, SettingsError
from utils import printable

log = logging.getLogger(__name__)

POLL_S = 0.5  # of a SuperLink; each poll is a request that takes some of its processor
SIMULATED_POLL_S = 0.01
SIMULATED_ASKED = 64  # clients of a simulation that are asked who they are: until then the workers are ready
FOREVER_S = 1e9  # in a simulation a message never ends by the time of day, which may be set
INTRODUCTION_S = 120.0  # a client that does not say within these who it is is set aside
ASIDE_S = 300.0  # until a client that was set aside is asked again
RIVAL_S = 60.0  # until one is whose place is taken: a node that was killed counts as there for about as long
MOST_NAME, MOST_REASON = 60, 20_000  # characters
UNANSWERED = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
EACH_ITS_OWN = "each needs its own --partition-id, which belongs to the key that took it first"


class Progress(Protocol):
    """Where the server says how far it is. See runs/progress.py."""

    def say(self, message: str) -> None: ...
    def resumed(self, round_number: int) -> None: ...
    def round_done(self, record: Mapping[str, Any]) -> None: ...
    def warn(self, message: str) -> None: ...


@dataclass(frozen=True)
class Site:
    """What a client said of itself, as far as it lasts for a run and its resumes."""

    name: str = ""
    key: str = ""
    """SHA-256 of its public key, if it has one that lasts: its partition is then its own for the whole run."""
    has_own_eval: bool = False
    """Whether `dataset.eval_name` stands for rows of its own there."""
    rows: str = ""
    eval_rows: str = ""
    """Fingerprints that only the client can make, so that it is known whether they are still the same."""
    ends_with: bool | None = None
    """Whether it wants the run's adapter at its end; None for a client that is told nothing of the end."""


Sites = dict[int, Site]  # by partition id


@dataclass
class Question:
    """Who a node is, as it was asked, on the monotonic clock."""

    node: int
    asked: float
    is_waited_for: bool


class Clients:
    """Clients by partition id, because Flower's node ids are random in every run and new after every restart.

    Sites are asked who they are, `known` ones of a resumed run too. In a simulation that is known, and only the first
    are asked. A reply with more than `most_bytes` of arrays is not read.
    """

    def __init__(
        self, grid: Grid, timeout_s: float, progress: Progress, known: Sites | None = None, most_bytes: float = inf
    ) -> None:
        self.grid, self.timeout_s, self.progress, self.most_bytes = grid, timeout_s, progress, most_bytes
        self.nodes: dict[int, int] = {}  # partition id -> Flower's node id
        self.is_simulated = isinstance(grid, InMemoryGrid)
        self.poll_s, self.ttl_s, self.introduction_s, self.aside_s = POLL_S, timeout_s, INTRODUCTION_S, ASIDE_S
        if self.is_simulated:  # its nodes are made in the order of their partitions, and answer when workers are ready
            self.poll_s, self.ttl_s = SIMULATED_POLL_S, FOREVER_S
            self.introduction_s = self.aside_s = FOREVER_S
            made = enumerate(cast(Any, grid).state.nodes)
            self.nodes = {partition: node for partition, node in made if partition >= SIMULATED_ASKED}
        self.sites: Sites = dict(known or {})  # by partition: who has it, here or not
        self.keys: dict[int, tuple[str, str]] = {}  # by node: SHA-256 of its public key, and its registered name
        self.started: dict[int, str] = {}  # by node: when it was started
        self.questions: dict[str, Question] = {}  # by message: who has not said yet who it is
        self.aside: dict[int, float] = {}  # by node: when it is asked again
        self.loading: dict[int, str] = {}  # by node: what it is still downloading
        self.num_rows: dict[int, int] = defaultdict(lambda: int(MOST))  # what they said, if they were asked
        self.own_data = False  # whether a client has rows that no other machine has
        self.unusable: set[int] = set()  # nodes that were left out for good
        self.strict = True  # until the first round: what makes no sense ends the run
        self.traffic = dict.fromkeys(("bytes_down", "bytes_up"), 0)  # since it was last taken

    def take_traffic(self) -> dict[str, int]:
        """Bytes of all arrays that were sent and received since this was last asked."""
        taken, self.traffic = self.traffic, dict.fromkeys(self.traffic, 0)
        return taken

    def label(self, partition: int) -> str:
        """How a client is called in every message about it: of a site with its name, if it has one, and its node id."""
        site, node = self.sites.get(partition), self.nodes.get(partition)
        if site is None:
            return f"client {partition}"
        return f"client {partition} ({', '.join([*filter(None, [site.name]), f'node {node}' if node else 'away'])})"

    def label_of_node(self, node: int, name: str = "") -> str:
        known = self.keys.get(node, ("", ""))[1] or name
        return f"node {node} ({known})" if known else f"node {node}"

    # --- who is there ---

    def wait_for(self, at_least: int, timeout_s: float = inf) -> None:
        """Wait for `at_least` clients, ask those that are new who they are, and forget those that are gone.

        A client that was just asked has INTRODUCTION_S seconds; after that nobody waits for it.

        Raises:
            SettingsError: if a client cannot work with these settings, before the first round.
            RunError: if one cannot say who it is, or two say the same, before the first round; or too few are there.
        """
        said, deadline, loading = 0, time.monotonic() + timeout_s, dict[int, str]()
        while True:
            self.look()
            if self.loading and self.loading != loading:
                loading, what = dict(self.loading), ", ".join(sorted(set(self.loading.values())))
                self.progress.say(f"{len(loading)} of {at_least} clients are downloading {what}")
            if len(self.nodes) >= at_least and not any(asked.is_waited_for for asked in self.questions.values()):
                return
            if time.monotonic() > deadline:
                raise RunError(f"{len(self.nodes)} of {at_least} clients (strategy.min_replies) came in {timeout_s:g}s")
            if said < (said := len(self.nodes)) and not self.is_simulated:
                self.progress.say(f"{said} of {at_least} clients are here")
            time.sleep(self.poll_s)

    def look(self) -> None:
        """Forget clients that are gone, ask nodes that are new who they are, and take down what was answered."""
        online, now = self.online(), time.monotonic()
        self.nodes = {partition: node for partition, node in self.nodes.items() if node in online}
        self.questions = {n: q for n, q in self.questions.items() if q.node in online and now - q.asked < self.aside_s}
        self.loading = {node: what for node, what in self.loading.items() if node in online}
        busy = {question.node for question in self.questions.values()} | self.unusable | set(self.nodes.values())
        for node in sorted(online - busy):
            if now >= self.aside.get(node, 0.0):
                ask = Message(RecordDict(), node, MessageType.QUERY, ttl=self.aside_s)
                for name in self.grid.push_messages([ask]):
                    self.questions[name] = Question(node, now, node not in self.loading)
        for reply in pull(self.grid, list(self.questions), self.most_bytes) if self.questions else []:
            question = self.questions.pop(reply.metadata.reply_to_message_id)
            self.meet(question.node, cleaned(reply))
        for question in self.questions.values():
            if question.is_waited_for and now - question.asked > self.introduction_s:
                question.is_waited_for = False
                silent = f"{self.label_of_node(question.node)} does not say who it is for {self.introduction_s:g}s"
                self.progress.warn(f"{silent}; nobody waits for it any more")

    def online(self) -> set[int]:
        """The nodes that are there. Of a SuperLink's, the keys are taken down that they are known by."""
        if self.is_simulated or not hasattr(self.grid, "get_nodes"):
            return set(self.grid.get_node_ids())
        nodes = list(self.grid.get_nodes())
        keys = {node.node_id: hashlib.sha256(node.public_key).hexdigest() for node in nodes}
        self.keys = {node.node_id: (keys[node.node_id], one_line(node.name, MOST_NAME)) for node in nodes}
        started = {node.node_id: str(node.last_activated_at) for node in nodes}
        again = {node for node in started if self.started.get(node, started[node]) != started[node]}
        self.started |= started
        self.nodes = {partition: node for partition, node in self.nodes.items() if node not in again}
        self.unusable -= again  # a node that was started again, under its old id, is asked again
        return set(self.keys)

    def meet(self, node: int, reply: Message) -> None:
        """Take down who the client on `node` is."""
        self.loading.pop(node, None)
        if reply.has_error():
            self.meet_error(node, reply)
            return
        try:
            facts: Any = reply.content["client"]
            partition, rows, device = int(facts["partition-id"]), int(facts["num-rows"]), str(facts["device"])
            if partition < 0 or not 0 <= rows <= MOST:
                raise ValueError(f"partition {partition} with {rows} rows")
        except (KeyError, TypeError, ValueError) as error:
            self.refuse(node, f"{self.label_of_node(node)} cannot say who it is: {one_line(repr(error), 200)}")
            return
        if loading := facts.get("loading"):  # it is asked again
            self.loading[node] = one_line(loading, 200)
            return
        site = self.site_of(node, facts)
        if not self.may_be(node, partition, site or Site()):
            return
        self.nodes[partition], self.num_rows[partition] = node, rows
        self.own_data |= bool(facts.get("own-data", False))
        if site:
            self.sites[partition] = site
        log.info("%s: %s rows, %s", self.label(partition), rows, one_line(device, 200))

    def meet_error(self, node: int, reply: Message) -> None:
        code, reason = reply.error.code, str(reply.error.reason)
        if code in UNANSWERED:  # it left without a word, or will be asked again
            return
        if code == SETTINGS_ERROR and self.strict:
            raise SettingsError(f"{self.label_of_node(node)} refuses: {reason}" if self.keys else reason)
        who = self.label_of_node(node) if self.keys else "a client"
        self.refuse(node, f"{who} cannot take part: {reason}")

    def site_of(self, node: int, facts: ConfigRecord) -> Site | None:
        """What a site says of itself; None of a client of a simulation."""
        if "wants-adapter" not in facts:
            return None
        key, name = self.keys.get(node, ("", ""))
        return Site(
            name=name or one_line(facts.get("name", ""), MOST_NAME),
            key=key if facts.get("lasting") is True else "",
            has_own_eval=facts.get("own-eval") is True,
            rows=one_line(facts.get("rows-fingerprint", ""), 100),
            eval_rows=one_line(facts.get("eval-fingerprint", ""), 100),
            ends_with=facts["wants-adapter"] is True,
        )

    def may_be(self, node: int, partition: int, new: Site) -> bool:
        """Whether `node` may be client `partition`: nobody else is, and its rows are those that it began with."""
        owner, me = self.sites.get(partition), self.label_of_node(node, new.name)
        if owner and owner.key not in ("", new.key):
            return self.refuse(node, f"{me} says that it is {self.label(partition)}; {EACH_ITS_OWN}")
        if partition in self.nodes:
            if self.strict:
                raise RunError(f"two clients have partition {partition}, the other is {me}; {EACH_ITS_OWN}")
            self.aside[node] = time.monotonic() + RIVAL_S
            self.progress.warn(f"{me} says that it is {self.label(partition)}, which is here; {EACH_ITS_OWN}")
            return False
        for kind, rows in (("rows", "its own rows"), ("eval_rows", "its rows of --eval")):
            before = getattr(owner, kind, "")
            if before not in ("", getattr(new, kind)):
                changed = f"{self.label(partition)}: {rows} are not those with which this run began"
                return self.refuse(node, f"{changed}; put them back, or start another run")
        return True

    def refuse(self, node: int, reason: str) -> bool:
        """Leave `node` out from here on, and return False; before the first round that ends the run."""
        if self.strict:
            raise RunError(reason)
        self.unusable.add(node)
        log.error("%s", reason)
        self.progress.warn(last_line(reason))
        return False

    # --- messages ---

    def exchange(self, messages: Iterable[Message], timeout_s: float | None = None) -> dict[int, Message]:
        """Send `messages`; what each client replies, by partition id: an error, if nothing came in time.

        A reply is known by the message that it answers: when a node is lost, the engine answers for it.
        """
        wait_s = self.timeout_s if timeout_s is None else timeout_s
        partitions, folds = {node: partition for partition, node in self.nodes.items()}, dict[Any, Any]()
        asked: dict[str, int] = {}  # by message: whom it went to, until the answer is there
        replies: dict[int, Message] = {}
        for message in messages:
            self.traffic["bytes_down"] += array_bytes(message)
            partition = partitions[message.metadata.dst_node_id]
            replies[partition] = Message(Error(SILENT, f"no reply in {wait_s:g}s"), reply_to=message)
            if partition in self.sites:
                message.content = folded(message.content, folds)
            asked |= dict.fromkeys(self.grid.push_messages([message]), partition)
        deadline = time.monotonic() + wait_s
        while asked and time.monotonic() < deadline:
            for reply in pull(self.grid, list(asked), self.most_bytes):
                replies[asked.pop(reply.metadata.reply_to_message_id)] = cleaned(reply)
                self.traffic["bytes_up"] += array_bytes(reply)
            if asked:
                time.sleep(self.poll_s)
        return dict(sorted(replies.items()))

    def with_own_eval(self) -> list[int]:
        """Clients that have rows of their own for `dataset.eval_name`, in a fixed order: these rows may differ."""
        return sorted(partition for partition in self.nodes if self.sites.get(partition, Site()).has_own_eval)


def cleaned(reply: Message) -> Message:
    """`reply` with its arrays unfolded; what it says of an error cannot steer a terminal, and has an end."""
    if reply.has_error():
        reply.error.__dict__["_reason"] = printable(str(reply.error.reason))[:MOST_REASON]
        if reply.error.code == SILENT:  # which is not for a client to say: it would be asked again and again
            reply.error.__dict__["_code"] = CLIENT_ERROR
        return reply
    with suppress(Exception):  # what cannot be unfolded stays as it is, and is found wanting
        reply.content = unfolded(reply.content)
    return reply


def one_line(text: object, width: int) -> str:
    return " ".join(printable(str(text)).split())[:width]


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "it gives no reason"


def array_bytes(message: Message) -> int:
    """Bytes of the arrays in a message."""
    if message.has_error():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
