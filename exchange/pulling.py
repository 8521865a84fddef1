"""Replies from a SuperLink's grid, up to the size that they can have: more than that is not read."""

from collections.abc import Sequence
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
    """A reply has more bytes than it can have."""


def pull(grid: Grid, names: Sequence[str], most_bytes: float) -> list[Message]:
    """The replies to the messages called `names` that are there, as `grid.pull_messages`.

    Args:
        most_bytes: of arrays in a reply; one that has more is answered by an error in its place.
    """
    if not isinstance(grid, HttpGrid):
        return list(grid.pull_messages(names))
    found = cast(Any, grid)._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=names))
    return [
        read_one(grid, proto.metadata, tree, most_bytes + SLACK_BYTES)
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True)
    ]


def read_one(grid: HttpGrid, metadata: Any, tree: Any, most_bytes: float) -> Message:
    """One reply, object by object; an error if it is too large, or not whole."""
    client, run_id = cast(Any, grid)._runtime_client, metadata.run_id
    pull_one = make_pull_object_fn_protobuf(client.PullObject, grid.node, run_id)
    read = 0

    def pull_object(name: str) -> bytes:
        nonlocal read
        content = pull_one(name)
        read += len(content)
        if read > most_bytes:
            raise TooLarge(f"its reply has more than the {most_bytes:.0f} bytes that it can have, and is not read")
        return content

    try:
        contents = pull_objects([part.object_id for part in iterate_object_tree(tree)], pull_object)
    except (ObjectPullError, TooLarge) as error:
        return in_place_of(metadata, error)
    finally:
        received = ConfirmMessageReceivedRequest(node=grid.node, run_id=run_id, message_object_id=metadata.message_id)
        client.ConfirmMessageReceived(received)
    message = cast(Message, inflate_object_from_contents(metadata.message_id, contents))
    asked = {"_message_id": metadata.message_id, "_reply_to_message_id": metadata.reply_to_message_id}
    message.metadata.__dict__.update(asked)  # as the SuperLink knows it, whatever the reply says of itself
    return message


def in_place_of(metadata: Any, error: Exception) -> Message:
    """What stands for a reply that was not read."""
    about = Metadata(
        run_id=metadata.run_id,
        message_id="",
        src_node_id=metadata.src_node_id,
        dst_node_id=metadata.dst_node_id,
        message_type=SYSTEM_MESSAGE_TYPE,
        group_id="",
        ttl=0,
        reply_to_message_id=metadata.reply_to_message_id,
        created_at=metadata.created_at,
    )
    code = ErrorCode.UNKNOWN if isinstance(error, TooLarge) else ErrorCode.MESSAGE_UNAVAILABLE
    return make_message(about, error=Error(code, str(error)))
