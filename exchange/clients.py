"""The clients as the server knows them: who is there, who each of them is, and messages to them and back."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from exchange.faults import SETTINGS_ERROR
from exchange.guard import MOST
from settings.schema import RunError, SettingsError

log = logging.getLogger(__name__)

POLL_S = 0.5  # of a SuperLink; each poll is a request that takes some of its processor
SIMULATED_POLL_S = 0.01
SIMULATED_ASKED = 64  # clients of a simulation that are asked who they are: when they have answered, workers are ready
SIMULATED_TTL_S = 1e9  # in a simulation messages never expire by the time of day, which somebody may set
NODE_UNAVAILABLE = ErrorCode.NODE_UNAVAILABLE


class Progress(Protocol):
    """Where the server says how far it is. See runs/progress.py."""

    def say(self, message: str) -> None: ...
    def resumed(self, round_number: int) -> None: ...
    def round_done(self, record: Mapping[str, Any]) -> None: ...
    def warn(self, message: str) -> None: ...


class Clients:
    """Clients by partition id, because Flower's node ids are random in every run and new after every restart.

    In a deployment every client is asked who it is. In a simulation that is known, and only the first are asked.
    """

    def __init__(self, grid: Grid, timeout_s: float, progress: Progress) -> None:
        self.grid, self.timeout_s, self.progress = grid, timeout_s, progress
        self.poll_s, self.ttl_s = POLL_S, timeout_s
        self.nodes: dict[int, int] = {}  # partition id -> Flower's node id
        if isinstance(grid, InMemoryGrid):  # of a simulation: its nodes are made in the order of their partitions
            self.poll_s, self.ttl_s = SIMULATED_POLL_S, SIMULATED_TTL_S
            made = list(cast(Any, grid.state).nodes)
            self.nodes = {partition: node for partition, node in enumerate(made) if partition >= SIMULATED_ASKED}
        self.loading: dict[int, str] = {}  # by node: what it is still downloading
        self.num_rows: dict[int, int] = defaultdict(lambda: int(MOST))  # what they said, if they were asked
        self.own_data = False  # whether a client has rows that no other machine has
        self.unusable: set[int] = set()  # nodes that were left out for good
        self.strict = True  # until the first round: what makes no sense ends the run
        self.traffic = dict.fromkeys(("bytes_down", "bytes_up"), 0)  # since it was last taken

    @property
    def silence(self) -> str:
        """The fault of a client that did not answer."""
        return f"no reply in {self.timeout_s:g}s"

    def take_traffic(self) -> dict[str, int]:
        """Bytes of all arrays that were sent and received since this was last asked."""
        taken, self.traffic = self.traffic, dict.fromkeys(self.traffic, 0)
        return taken

    def wait_for(self, at_least: int, timeout_s: float = float("inf")) -> None:
        """Wait for `at_least` clients, ask those that are new who they are, and forget those that are gone.

        A node that comes with the partition of another takes its place: nodes get new ids when they restart.

        Raises:
            SettingsError: if a client cannot work with these settings, before the first round.
            RunError: if a client cannot say who it is, or two say the same, before the first round; if there are
                too few after `timeout_s` seconds.
        """
        said, deadline = 0, time.monotonic() + timeout_s
        while True:
            online = set(self.grid.get_node_ids())
            self.nodes = {partition: node for partition, node in self.nodes.items() if node in online}
            new = sorted(online - set(self.nodes.values()) - self.unusable)
            replies = self.exchange([Message(RecordDict(), n, MessageType.QUERY, ttl=self.ttl_s) for n in new])
            before, self.loading = self.loading, {}
            for node, reply in replies.items():
                self.meet(node, reply)
            if self.loading and self.loading != before:
                what = ", ".join(sorted(set(self.loading.values())))
                self.progress.say(f"{len(self.loading)} of {at_least} clients are downloading {what}")
            if len(self.nodes) >= at_least:
                return
            if len(replies) < len(new):
                raise RunError(f"{len(self.nodes)} of {at_least} clients answered in {self.timeout_s:g}s")
            if time.monotonic() > deadline:
                raise RunError(f"{len(self.nodes)} of {at_least} clients (strategy.min_replies) came in {timeout_s:g}s")
            if said < (said := len(self.nodes)):
                self.progress.say(f"{said} of {at_least} clients are here")
            time.sleep(self.poll_s)

    def meet(self, node: int, reply: Message) -> None:
        """Take down who the client on `node` is."""
        if reply.has_error():
            if reply.error.code == SETTINGS_ERROR and self.strict:
                raise SettingsError(reply.error.reason)
            if reply.error.code != NODE_UNAVAILABLE:  # else it left without a word, or will be asked again
                self.refuse(node, f"a client cannot take part: {reply.error.reason}")
            return
        try:
            facts: Any = reply.content["client"]
            partition, rows, device = int(facts["partition-id"]), int(facts["num-rows"]), str(facts["device"])
            if partition < 0 or not 0 <= rows <= MOST:
                raise ValueError(f"partition {partition} with {rows} rows")
        except (KeyError, TypeError, ValueError) as error:
            self.refuse(node, f"a client cannot say who it is: {error!r}")
            return
        if loading := facts.get("loading"):  # it is asked again
            self.loading[node] = str(loading)
            return
        if partition in self.nodes:
            self.refuse(
                self.nodes[partition], f"two clients have partition {partition}; each needs its own partition-id"
            )
        self.nodes[partition] = node
        self.num_rows[partition] = rows
        self.own_data |= bool(facts.get("own-data", False))
        log.info("client %s: %s rows, %s", partition, rows, device)

    def refuse(self, node: int, reason: str) -> None:
        """Leave `node` out from here on; before the first round that ends the run."""
        if self.strict:
            raise RunError(reason)
        self.unusable.add(node)
        log.error("%s", reason)
        self.progress.warn(last_line(reason))

    def exchange(self, messages: Iterable[Message]) -> dict[int, Message]:
        """Send `messages`; the replies that came in time, by node id.

        A reply is known by the message that it answers: when a node is lost, the engine answers for it.
        """
        sent: dict[str, int] = {}
        for message in messages:
            self.traffic["bytes_down"] += array_bytes(message)
            sent |= dict.fromkeys(self.grid.push_messages([message]), message.metadata.dst_node_id)
        deadline = time.monotonic() + self.timeout_s
        replies: dict[int, Message] = {}
        while len(replies) < len(sent) and time.monotonic() < deadline:
            waiting = [name for name, node in sent.items() if node not in replies]
            for reply in self.grid.pull_messages(waiting):
                replies[sent[reply.metadata.reply_to_message_id]] = reply
                self.traffic["bytes_up"] += array_bytes(reply)
            if len(replies) < len(sent):
                time.sleep(self.poll_s)
        return replies


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "it gives no reason"


def array_bytes(message: Message) -> int:
    """Bytes of the arrays in a message."""
    if message.has_error():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
