"""A client's failure as it travels: one line with what has to be changed, or a traceback."""

import logging
import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Error, Message, RecordDict

from settings.schema import RunError, SettingsError, WorkerError
from utils import SUITE_FOLDER

CLIENT_ERROR = 101  # Error.code of a reply that carries a client's traceback
WORKER_DIED = 102  # of a reply in the name of a worker that died or was too late, or of one that has to be replaced
SETTINGS_ERROR = 103  # of one that says in a line what has to be changed, which no other try would


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


# A site's failure: what is said of it elsewhere holds nothing of its rows, its files or its machine.

PLACE = re.compile(
    r"[\w.]+=[^:]*: (?:[^\s:]+\.[^\s:]+ (line)|(row)) (\d{1,7})\b"
)  # where a file cannot be read, or a row be used

OUTLINES = (
    (SettingsError, "its rows or files cannot be used"),
    (WorkerError, "its GPU failed, and its worker process was replaced"),
)


def failure_of(error: Exception, own: Iterable[str]) -> tuple[int, str, str]:
    """What `error` is to others: its code, a text that may leave the site, and all there is for the site itself.

    Args:
        own: names of files and folders that must not leave either.
    """
    explains_itself = isinstance(error, SettingsError | RunError)
    whole = str(error) if explains_itself else "".join(traceback.format_exception(error))
    told: str = getattr(error, "told", None) or outline(error)
    for name in sorted(own, key=len, reverse=True):
        told = told.replace(name, "(the site's own)") if len(name) > 1 else told
    kinds = ((SettingsError, SETTINGS_ERROR), (WorkerError, WORKER_DIED), (Exception, CLIENT_ERROR))
    return next(code for kind, code in kinds if isinstance(error, kind)), told, whole


def outline(error: Exception) -> str:
    """What went wrong and where in the suite's code, without the error's own words: they may quote a row."""
    places = []
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file.is_relative_to(SUITE_FOLDER):
            places.append(f"{frame.name} ({file.relative_to(SUITE_FOLDER)})")
    found = PLACE.match(str(error))
    place = f", {found[1] or found[2]} {found[3]}" if found else ""
    kind = next((words for known, words in OUTLINES if isinstance(error, known)), type(error).__name__)
    return f"{kind}{place}: {', '.join(places[-2:])}; this site's own terminal and log say more"
