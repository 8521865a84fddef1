"""The sites of a run: which of them has which partition, noted in its folder, for it belongs to the key that took it
first; and the end, when each gets the adapter that the run ends with.
"""

import json
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from exchange.clients import Clients, Site
from exchange.faults import SILENT
from exchange.transfer import to_record
from model import ADAPTER_FILE, load_adapter
from runs.record import Record
from runs.runfolder import folder_of
from settings.schema import RunError, SettingsError
from utils import CARD_FILE, file_sha256, write_json

log = logging.getLogger(__name__)

LEAST_S = 60.0  # for an answer, behind the adapter's way there
SITES_FILE = "sites.json"


def noted(folder: Path) -> dict[int, Site]:
    """Who had which partition when the run in `folder` was last played. Raises SettingsError if that is damaged."""
    file = folder / SITES_FILE
    if not file.exists():
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {int(partition): Site(**facts) for partition, facts in known.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        damaged = f"{SITES_FILE} cannot be read ({error}); remove it to forget it"
        raise SettingsError(f"resume={folder}: {damaged}") from error


def note(folder: Path, sites: Mapping[int, Site]) -> None:
    """Take down who has which partition, if anybody is more than a client of a simulation."""
    if sites and sites != noted(folder):
        try:
            write_json(folder / SITES_FILE, {str(partition): asdict(site) for partition, site in sorted(sites.items())})
        except OSError as error:
            raise RunError(f"{folder}: results cannot be written ({error})") from error


def hand_over(clients: Clients, record: Record, summary: Mapping[str, Any], wait_s: float) -> None:
    """Send what `record` ends with to all sites of the run; those that are away are waited for up to `wait_s` seconds.

    Who does not get it is named; the run is complete all the same.
    """
    left = {partition for partition, site in clients.sites.items() if site.ends_with is not None}
    if not left:
        return
    deadline = time.monotonic() + wait_s
    try:
        final = contents(record, summary)
        while left := left - served(clients, left, final, max(LEAST_S, wait_s)):
            if time.monotonic() >= deadline:
                break
            clients.progress.say(f"waiting for {len(left)} sites to hand them the adapter")
            time.sleep(clients.poll_s)
    except Exception as error:  # the run itself is complete, and on disk
        log.exception("the adapter could not be handed over")
        clients.progress.warn(f"the adapter could not be handed over ({error})")
    for partition in sorted(left):
        missed = f"{clients.label(partition)} did not get the adapter in strategy.final_wait_s={wait_s:g}"
        clients.progress.warn(f"{missed}; give it {record.folder / summary['adapter']} yourself")


def served(clients: Clients, left: Collection[int], final: RecordDict, timeout_s: float) -> set[int]:
    """Send `final` to those of `left` that are there; returns who answered."""
    clients.look()
    messages = []
    for partition in sorted(clients.nodes.keys() & left):
        content = final if clients.sites[partition].ends_with else RecordDict({"config": final["config"]})
        messages.append(Message(content, clients.nodes[partition], f"{MessageType.QUERY}.final", ttl=timeout_s))
    replies = clients.exchange(messages, timeout_s)
    answered = {p: reply for p, reply in replies.items() if not (reply.has_error() and reply.error.code == SILENT)}
    for partition, reply in answered.items():
        if reply.has_content():
            log.info("%s has what the run ended with", clients.label(partition))
        else:
            clients.progress.warn(f"{clients.label(partition)} does not take the adapter: {reply.error.reason}")
    return set(answered)


def contents(record: Record, summary: Mapping[str, Any]) -> RecordDict:
    """The last adapter, and the one with the lowest held-out loss if that is another, with cards and digests."""
    last = record.state.round_number
    best = record.best or last
    config: dict[str, Any] = {"rounds": last, "ended": str(summary["ended"] or "")}
    records: dict[str, Any] = {}
    for kind, number in ({"final": last} | ({"best": best} if best != last else {})).items():
        folder = folder_of(record.folder, number)
        if not folder.is_dir():  # the best one may have been measured in a round that is not kept
            continue
        records[kind] = to_record(load_adapter(folder))
        config |= {f"{kind}-round": number, f"{kind}-sha256": file_sha256(folder / ADAPTER_FILE)}
        config[f"{kind}-card"] = (folder / CARD_FILE).read_text(encoding="utf-8")
    return RecordDict(records | {"config": ConfigRecord(config)})
