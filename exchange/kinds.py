"""The kinds of messages that a server sends, and which handler answers each, in a simulation and on a node."""

from collections.abc import Callable
from typing import Any

from flwr.clientapp import ClientApp

HANDLER_NAMES = {  # by Flower's message type
    "query": "describe",
    "query.initial_adapter": "initial",
    "query.final": "final",
    "train": "train",
    "evaluate": "evaluate",
}


def client_app(handler: Callable[[str], Callable[..., Any]]) -> ClientApp:
    """A ClientApp that answers each kind of message with the `handler` of that name."""
    app = ClientApp()
    for kind, name in HANDLER_NAMES.items():
        purpose, _, action = kind.partition(".")
        getattr(app, purpose)(*[action] if action else [])(handler(name))
    return app
