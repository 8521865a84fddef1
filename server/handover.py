"""The end of a run: every site gets the adapter that it ends with, and learns that it has ended."""

import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from exchange.clients import Clients
from exchange.transfer import to_record
from model import ADAPTER_FILE, load_adapter
from runs.record import Record
from runs.runfolder import folder_of
from utils import CARD_FILE, file_sha256

log = logging.getLogger(__name__)

LEAST_S = 60.0  # for an answer, behind the adapter's way there


def hand_over(clients: Clients, record: Record, summary: Mapping[str, Any], wait_s: float) -> None:
    """Send what `record` ends with to all sites of the run; those that are away are waited for up to `wait_s` seconds.

    Who does not get it is named; the run is complete all the same.
    """
    left = {partition for partition, site in clients.sites.items() if site.ends_with is not None}
    deadline = time.monotonic() + wait_s
    try:
        final = contents(record, summary) if left else RecordDict()
        while left := left - served(clients, left, final, max(LEAST_S, wait_s)):
            if time.monotonic() >= deadline:
                break
            clients.progress.say(f"waiting for {len(left)} sites to hand them the adapter")
            time.sleep(clients.poll_s)
    except Exception as error:  # the run itself is complete, and on disk
        log.exception("the adapter could not be handed over")
        clients.progress.warn(f"the adapter could not be handed over ({error})")
    for partition in sorted(left):
        clients.progress.warn(
            f"{clients.label(partition)} did not get the adapter in strategy.final_wait_s={wait_s:g}; give it "
            f"{record.folder / summary['adapter']} yourself"
        )


def served(clients: Clients, left: Collection[int], final: RecordDict, timeout_s: float) -> set[int]:
    """Send `final` to those of `left` that are there; returns who answered."""
    if not left:
        return set()
    clients.look()
    here, kind = sorted(clients.nodes.keys() & left), f"{MessageType.QUERY}.final"
    messages = []
    for partition in here:
        content = final if clients.sites[partition].ends_with else RecordDict({"config": final["config"]})
        messages.append(Message(content, clients.nodes[partition], kind, ttl=timeout_s))
    replies = clients.exchange(messages, timeout_s)
    answered = {partition for partition in here if clients.nodes[partition] in replies}
    for partition in sorted(answered):
        reply = replies[clients.nodes[partition]]
        if reply.has_content():
            log.info("%s has what the run ended with", clients.label(partition))
        else:
            clients.progress.warn(f"{clients.label(partition)} does not take the adapter: {reply.error.reason}")
    return answered


def contents(record: Record, summary: Mapping[str, Any]) -> RecordDict:
    """The last adapter, and the one with the lowest held-out loss if that is another, with cards and digests."""
    last = record.state.round_number
    kinds = {"final": last} | ({"best": record.best} if record.best not in (None, last) else {})
    config: dict[str, Any] = {"rounds": int(last), "ended": str(summary["ended"] or "")}
    records: dict[str, Any] = {}
    for kind, number in kinds.items():
        folder = folder_of(record.folder, int(number or last))
        if not folder.is_dir():  # the best one may have been measured in a round that is not kept
            continue
        records[kind] = to_record(load_adapter(folder))
        config |= {f"{kind}-round": int(number or last), f"{kind}-sha256": file_sha256(folder / ADAPTER_FILE)}
        config[f"{kind}-card"] = (folder / CARD_FILE).read_text(encoding="utf-8")
    return RecordDict(records | {"config": ConfigRecord(config)})
