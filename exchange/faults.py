"""A client's failure as it travels: one line with what has to be changed, or a traceback."""

import logging
import traceback
from collections.abc import Callable

from flwr.app import Error, Message, RecordDict

from settings.schema import RunError, SettingsError, WorkerError

CLIENT_ERROR = 1  # Error.code of a reply that carries a client's traceback
WORKER_DIED = 2  # of a reply in the name of a worker that died or was too late, or of one that has to be replaced
SETTINGS_ERROR = 3  # of one that says in a line what the user has to change: trying again would not help


def replied(message: Message, work: Callable[[], RecordDict]) -> Message:
    """The reply to `message` with what `work` returns, or with what it raises: a line, or a traceback."""
    try:
        return Message(work(), reply_to=message)
    except SettingsError as error:
        logging.getLogger(__name__).error("%s", error)
        return Message(Error(SETTINGS_ERROR, str(error)), reply_to=message)
    except WorkerError as error:
        logging.getLogger(__name__).exception("the worker is of no use any more")
        return Message(Error(WORKER_DIED, str(error)), reply_to=message)
    except RunError as error:
        logging.getLogger(__name__).error("%s", error)
        return Message(Error(CLIENT_ERROR, str(error)), reply_to=message)
    except Exception:  # whatever it is, the server must learn of it
        logging.getLogger(__name__).exception("client failed")
        return Message(Error(CLIENT_ERROR, traceback.format_exc()), reply_to=message)
