"""Messages from a SuperLink, up to the size that they can have: more than that is not read."""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from flwr.app import Message, Metadata
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects
from flwr.superlink.grid import HttpGrid

SLACK_BYTES = 1_000_000  # of names, numbers and Flower's own words around the arrays


class TooLarge(Exception):
    """A message has more bytes than it can have; the text says how many it can."""


def pull(grid: Grid, names: Sequence[str], most_bytes: float) -> list[Message]:
    """The replies to the messages called `names` that are there, as `grid.pull_messages`.

    Args:
        most_bytes: of arrays in a reply; one that has more, or is not whole, is answered by an error in its place.
    """
    if not isinstance(grid, HttpGrid):
        return list(grid.pull_messages(names))
    client, replies = cast(Any, grid)._runtime_client, []
    found = client.PullMessages(PullAppMessagesRequest(message_ids=names))
    for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
        try:
            reply = read(operator.call, client, grid.node, proto.metadata, tree, most_bytes + SLACK_BYTES)
            # as the SuperLink knows it, whatever the reply says of itself
            reply.metadata.__dict__["_reply_to_message_id"] = proto.metadata.reply_to_message_id
        except TooLarge as error:
            reason = f"its reply has more than the {error} that it can have, and is not read"
            reply = in_place_of(proto.metadata, Error(ErrorCode.UNKNOWN, reason))
        except ObjectPullError as error:
            reply = in_place_of(proto.metadata, Error(ErrorCode.MESSAGE_UNAVAILABLE, str(error)))
        replies.append(reply)
    return replies


def read(call: Callable[..., Any], client: Any, node: Any, metadata: Any, tree: Any, most_bytes: float) -> Message:
    """A message that waits at the SuperLink, object by object. The SuperLink can forget it then.

    Args:
        call: calls a method of `client` with a request, and returns its answer.

    Raises:
        TooLarge: as soon as it has more than `most_bytes`.
        ObjectPullError: if it is not whole, or broken.
    """
    pull_one = make_pull_object_fn_protobuf(partial(call, client.PullObject), node, metadata.run_id)
    read_bytes = 0

    def pull_object(name: str) -> bytes:
        nonlocal read_bytes
        content = pull_one(name)
        read_bytes += len(content)
        if read_bytes > most_bytes:
            raise TooLarge(f"{most_bytes:.0f} bytes")
        return content

    received = ConfirmMessageReceivedRequest(node=node, run_id=metadata.run_id, message_object_id=metadata.message_id)
    try:
        contents = pull_objects([part.object_id for part in iterate_object_tree(tree)], pull_object)
    except (ObjectPullError, TooLarge):
        call(client.ConfirmMessageReceived, received)
        raise
    call(client.ConfirmMessageReceived, received)
    try:
        message = cast(Message, inflate_object_from_contents(metadata.message_id, contents))
        message.metadata.__dict__["_message_id"] = metadata.message_id
    except Exception as error:  # whatever others sent
        raise ObjectPullError(metadata.message_id, f"it is broken ({type(error).__name__})") from error
    return message


def in_place_of(metadata: Any, error: Error) -> Message:
    """What stands for a reply that was not read."""
    ours: dict[str, Any] = dict(message_id="", message_type=SYSTEM_MESSAGE_TYPE, group_id="", ttl=0)
    kept = ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "created_at")
    return make_message(Metadata(**ours, **{name: getattr(metadata, name) for name in kept}), error=error)
