"""A client's failure as it travels: one line with what has to be changed, or a traceback.

Of a site's failure, what is said elsewhere holds nothing of its rows, its files or its machine.
"""

import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from settings.schema import RunError, SettingsError, WorkerError
from utils import SUITE_FOLDER

CLIENT_ERROR = 101  # Error.code of a reply that carries a client's traceback
WORKER_DIED = 102  # of a reply in the name of a worker that died or was too late, or of one that has to be replaced
SETTINGS_ERROR = 103  # of one that says in a line what has to be changed, which no other try would
SILENT = 104  # of one in the name of a client that did not answer in time


# where a file cannot be read, or a row be used
PLACE = re.compile(r"[\w.]+=[^:]*: (?:[^\s:]+\.[^\s:]+ (line)|(row)) (\d{1,7})\b")


def kind_of(error: Exception) -> tuple[int, str]:
    """The code of what a client fails with, and what may be said of it elsewhere, without its own words."""
    if isinstance(error, SettingsError):
        return SETTINGS_ERROR, "its rows or files cannot be used"
    if isinstance(error, WorkerError):
        return WORKER_DIED, "its GPU failed, and its worker process was replaced"
    return CLIENT_ERROR, type(error).__name__


def failure_of(error: Exception, own: Iterable[str] = ()) -> tuple[int, str, str]:
    """What `error` is to others: its code, a text that may leave the site, and all there is for the site itself.

    Names of the site's `own` files and folders do not leave either.
    """
    explains_itself = isinstance(error, SettingsError | RunError)
    whole = str(error) if explains_itself else "".join(traceback.format_exception(error))
    told: str = getattr(error, "told", None) or outline(error)
    for name in sorted(own, key=len, reverse=True):
        told = told.replace(name, "(the site's own)") if len(name) > 1 else told
    return kind_of(error)[0], told, whole


def outline(error: Exception) -> str:
    """What went wrong and where in the suite's code, without the error's own words: they may quote a row."""
    places = []
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file.is_relative_to(SUITE_FOLDER):
            places.append(f"{frame.name} ({file.relative_to(SUITE_FOLDER)})")
    found = PLACE.match(str(error))
    place = f", {found[1] or found[2]} {found[3]}" if found else ""
    return f"{kind_of(error)[1]}{place}: {', '.join(places[-2:])}; this site's own terminal and log say more"
