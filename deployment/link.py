"""A node's connection to the SuperLink: Flower's own SuperNode protocol, with Flower's own client for it.

Flower's `flower-supernode` unpacks and runs the code that a run brings along, in a new process for every message. Here
the messages come to this process as data, and what answers them is for the caller to say. Uses inner modules of flwr,
whose version is therefore pinned.
"""

import hashlib
import re
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import fab_from_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto import fleet_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, push_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from deployment.connection import client_of
from exchange.pulling import read
from settings.schema import SettingsError

ACTIVATION_S = 120.0  # a node that was killed counts as there for a minute
AGAIN_S, MOST_AGAIN_S = 0.5, 15.0  # between two tries, doubled
CLOCK_S = 4.0  # Flower refuses a node whose clock is 5 s ahead or 305 s behind
BUSY_STATUS = (500, 502, 503, 504)


class RunOver(Exception):
    """The SuperLink takes nothing more for this run: it ended, or was stopped."""


class NotAccepted(Exception):
    """Why the SuperLink does not let this node take part."""


class Refused(Exception):
    """What the SuperLink, or the proxy before it, does not take, or does not give whole."""


@dataclass(frozen=True)
class Task:
    """One message, and the run that it belongs to."""

    message: Message
    run: Run
    bundle: bytes


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node's private key. Raises SettingsError if the file holds none; the text says what to do."""
    option, use = f"--auth-supernode-private-key={path}", "use one that deployment.certificates made"
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); it must be readable by the user of this node"
        raise SettingsError(f"{option}: {reason}") from error
    except (ValueError, UnsupportedAlgorithm, TypeError) as error:
        raise SettingsError(f"{option}: is no private key of a node; {use}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError(f"{option}: is no elliptic-curve key; {use}")
    return key


def rows_key(key: ec.EllipticCurvePrivateKey) -> str:
    """A secret for fingerprints of rows, as hex, that nobody can make without a node's private key."""
    form = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return hashlib.sha256(b"rows" + key.private_bytes(*form)).hexdigest()


class Link:
    """This node as the SuperLink knows it. Use as a context manager: it takes its leave at the end."""

    def __init__(self, options: Namespace, key: ec.EllipticCurvePrivateKey | None, say: Callable[[str], None]) -> None:
        self.registers_itself, self.say = key is None, say
        private, public = (key, key.public_key()) if key else generate_key_pairs()
        self.public_key = public_key_to_bytes(public)
        signs = NodeAuthHttpInterceptor(private, public)
        self.client = client_of(FleetHttpClient, options, RuntimeVersionHttpInterceptor("SuperNode"), signs)
        self.node = Node()
        self.runs: dict[int, tuple[Run, bytes]] = {}
        self.bytes_sent = self.bytes_received = 0
        self.leaving = threading.Event()

    def __enter__(self) -> "Link":
        self.activate()
        threading.Thread(target=self.stay_online, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leaving.set()
        with suppress(httpx.HTTPError, RuntimeError):  # it learns of it from the missing heartbeats
            self.client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self.node.node_id))
            if self.registers_itself:
                self.client.UnregisterNode(fleet_pb2.UnregisterNodeFleetRequest(node_id=self.node.node_id))
        self.client.close()

    # --- who this is ---

    def activate(self) -> None:
        """Be there for the SuperLink as a node. Raises NotAccepted after ACTIVATION_S seconds, with why."""
        deadline, said = time.monotonic() + ACTIVATION_S, ""
        while True:
            try:
                if self.registers_itself:
                    self.register()
                if self.node.node_id:  # it takes nobody's key twice, not even from the same node
                    with suppress(httpx.HTTPStatusError):
                        self.client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self.node.node_id))
                self.node = Node(node_id=self.client.ActivateNode(self.activation()).node_id)
                return
            except httpx.HTTPError as error:
                reason = self.why_refused(error)
            if time.monotonic() > deadline:
                raise NotAccepted(reason)
            if said != (said := re.sub(r"\d", "", reason)):  # a clock that is off is off by another second now
                self.say(f"warning: {reason}; tried again for {deadline - time.monotonic():.0f} s")
            self.leaving.wait(3)

    def register(self) -> None:
        """Let the SuperLink take a key that nobody registered, unless it has it already or takes none."""
        try:
            self.client.RegisterNode(fleet_pb2.RegisterNodeFleetRequest(public_key=self.public_key))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.PRECONDITION_FAILED:
                raise

    def activation(self, interval: float = HEARTBEAT_DEFAULT_INTERVAL) -> fleet_pb2.ActivateNodeRequest:
        return fleet_pb2.ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=interval)

    def why_refused(self, error: httpx.HTTPError) -> str:
        """What hinders the activation of this node, in words that say what to do."""
        if not isinstance(error, httpx.HTTPStatusError):
            text = str(error)
            if "CERTIFICATE_VERIFY_FAILED" in text:
                return f"the SuperLink's certificate is not the one that --root-certificates trusts ({text})"
            return f"the SuperLink does not answer ({text or type(error).__name__})"
        response = error.response
        if response.status_code == httpx.codes.UNAUTHORIZED:
            if abs(ahead := clock_ahead_s(response)) > CLOCK_S:
                direction = "ahead of" if ahead > 0 else "behind"
                return f"this machine's clock is {abs(ahead):.0f} s {direction} the SuperLink's: set it by NTP"
            return "the SuperLink does not accept this node's signature"
        if response.status_code == httpx.codes.FORBIDDEN:
            return "the server's proxy does not let nodes through (403)"
        if self.registers_itself:
            return "the SuperLink takes registered nodes only: give --auth-supernode-private-key=FILE"
        try:  # the interval is looked at after the key, and nothing is changed
            self.client.ActivateNode(self.activation(-1.0))
        except httpx.HTTPStatusError as answer:
            if answer.response.status_code == httpx.codes.BAD_REQUEST:
                return "this node's key is in use: by another node, or by this one, if it was killed a moment ago"
        except httpx.HTTPError:
            pass
        return "this node's public key is not registered at the SuperLink: have the coordinator register it"

    def stay_online(self) -> None:
        while not self.leaving.wait(HEARTBEAT_DEFAULT_INTERVAL / 3):
            beat = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            with suppress(httpx.HTTPError, ValueError):  # the next call says why
                self.client.SendNodeHeartbeat(beat)

    # --- messages ---

    def call(self, method: Callable[[Any], Any], request: Any) -> Any:
        """One request, tried again while the SuperLink cannot be reached. Raises RunOver, NotAccepted and Refused."""
        wait_s, started = AGAIN_S, time.monotonic()
        while True:
            try:
                answer = method(request)
                self.bytes_sent += request.ByteSize()
                self.bytes_received += answer.ByteSize()
                return answer
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status == httpx.codes.FORBIDDEN:
                    raise RunOver from error
                if status == httpx.codes.UNAUTHORIZED:
                    raise NotAccepted(self.why_refused(error)) from error
                if status not in BUSY_STATUS:
                    path, text = error.request.url.path, " ".join(error.response.text.split())[:200]
                    raise Refused(f"the server answers {status} to {path}: {text}") from error
                reason = f"status {status}"
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            if wait_s == AGAIN_S:
                self.say(f"warning: the SuperLink cannot be reached ({reason}); trying on")
            if self.leaving.wait(wait_s):
                raise NotAccepted(f"the SuperLink cannot be reached since {time.monotonic() - started:.0f} s")
            wait_s = min(2 * wait_s, MOST_AGAIN_S)

    def receive(self, most_bytes: float) -> Task | None:
        """The next message for this node, if there is one. Raises TooLarge if it has more than `most_bytes`."""
        found = self.call(self.client.PullMessages, fleet_pb2.PullMessagesRequest(node=self.node))
        if not found.messages_list:
            return None
        metadata = message_from_proto(found.messages_list[0]).metadata
        run, bundle = self.run_of(metadata.run_id)
        try:
            message = read(self.call, self.client, self.node, metadata, found.message_object_trees[0], most_bytes)
        except ObjectPullError as error:
            raise Refused(str(error)) from error
        return Task(message, run, bundle)

    def run_of(self, run_id: int) -> tuple[Run, bytes]:
        """What the SuperLink knows of a run, and its bundle."""
        if run_id not in self.runs:
            run = run_from_proto(self.call(self.client.GetRun, GetRunRequest(node=self.node, run_id=run_id)).run)
            ask = GetFabRequest(node=self.node, hash_str=run.fab_hash, run_id=run_id)
            self.runs = {run_id: (run, fab_from_proto(self.call(self.client.GetFab, ask).fab).content)}
        return self.runs[run_id]

    def is_over(self, run_id: int) -> bool:
        """Whether a run has ended; not while the SuperLink cannot be asked."""
        try:
            self.client.GetRun(GetRunRequest(node=self.node, run_id=run_id))
        except httpx.HTTPStatusError as error:
            return error.response.status_code == httpx.codes.FORBIDDEN
        except httpx.HTTPError:
            pass
        return False

    def identify(self, run_id: int) -> None:
        """Messages that this process makes from here on are this node's, for this run."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, self.node.node_id, 0

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply that took `seconds`."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            request = fleet_pb2.PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            response = self.call(self.client.PushMessages, request)
            push_one = partial(self.call, self.client.PushObject)
            push = make_push_object_fn_protobuf(push_one, self.node, reply.metadata.run_id, response.session_id)
            push_objects(get_all_nested_objects(reply), push, object_ids_to_push=set(response.objects_to_push))


def clock_ahead_s(response: httpx.Response) -> float:
    """Seconds that this machine's clock is ahead of the one that dated `response`; 0 if it has no date."""
    try:
        return time.time() - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return 0.0
