"""A node: it takes a run's messages from the SuperLink as data, and answers them with its own code alone."""

import logging
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run

from deployment import bundle
from deployment.link import Link, NotAccepted, Refused, RunOver, Task
from deployment.resident import Answer, Died, GivenUp, ResidentWorker
from exchange.kinds import HANDLER_NAMES
from exchange.pulling import TooLarge
from settings.policy import Policy
from utils import bytes_text, printable

log = logging.getLogger("node")

BUSY_POLL_S, IDLE_POLL_S, BUSY_S = 0.5, 3.0, 120.0  # a node that had a message lately asks more often
LOOK_S = 15.0  # between two looks at whether a silent run has ended
SHOWN = ("rows", "train_loss", "eval_loss")
OVERRIDES = "overrides"  # the one key of a run-config


@dataclass
class Tally:
    """What one run has had of this node so far."""

    run: Run
    messages: int = 0
    rows_trained: int = 0
    rows: int = 0
    """Rows that it trains on."""
    ended: bool = False


@dataclass
class Node:
    """What answers."""

    link: Link
    worker: ResidentWorker
    config: Mapping[str, Any]
    policy: Policy
    tally: Tally | None = None

    def play(self) -> None:
        """Answer messages, one after the other, until this process is told to end.

        Raises NotAccepted if the SuperLink does not accept this node any more, and Died if the worker cannot start.
        """
        last = looked = 0.0
        while True:
            try:
                task = self.link.receive(self.policy.max_message_bytes)
                if task:
                    self.answer(task)
                    last = looked = time.monotonic()
                    continue
            except RunOver:
                self.say_ended()
            except TooLarge as error:
                log.error("a message of more than %s is not read: this node's policy has max_message_bytes", error)
            except Refused as error:
                log.error("%s", error)
            except NotAccepted as error:  # the SuperLink was restarted, or a clock was set
                log.warning("%s", error)
                self.link.activate()
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                if self.tally and not self.tally.ended and self.link.is_over(self.tally.run.run_id):
                    self.say_ended()
            time.sleep(BUSY_POLL_S if time.monotonic() - last < BUSY_S else IDLE_POLL_S)

    # --- one message ---

    def answer(self, task: Task) -> None:
        tally, kind, start = self.tally_of(task), task.message.metadata.message_type, time.monotonic()
        answer = self.answer_of(task)
        seconds = time.monotonic() - start
        if answer is None:
            return
        self.link.identify(task.run.run_id)
        told: Any = Error(answer.code, answer.told) if answer.code else answer.content
        if answer.code:  # its owner learns of it, whether or not the server still does
            log.error("%s: %s", kind, answer.whole)
        self.link.send(Message(told, reply_to=task.message), seconds)
        tally.messages += 1
        if answer.code:
            return
        log.info("%s: %.1f s%s", kind, seconds, self.shown(answer.content, tally))
        if kind == "query.final" and not tally.ended:
            self.say_final(task, answer, tally)

    def answer_of(self, task: Task) -> Answer | None:
        """What is answered to a message; None if nobody waits for it any more."""
        metadata, run_id = task.message.metadata, task.run.run_id
        if fault := self.fault_of(task):
            return failed(ErrorCode.INVALID_FAB, fault)
        if (handler := HANDLER_NAMES.get(metadata.message_type)) is None:
            kind = printable(metadata.message_type)[:100]
            return failed(ErrorCode.UNKNOWN, f"this node has no answer to messages of the type {kind}")
        most_s = min(self.policy.max_seconds, metadata.ttl)
        try:
            return self.ask(handler, task.run, task.message.content, most_s, lambda: self.link.is_over(run_id))
        except GivenUp as error:
            limit = "its policy's max_seconds" if most_s == self.policy.max_seconds else "strategy.round_timeout_s"
            text = f"{metadata.message_type}: {error} ({limit})"
            log.warning("%s", text)
            return None if self.link.is_over(run_id) else failed(ErrorCode.UNKNOWN, text)
        except Died as error:
            if self.worker.process.poll() is not None:
                raise
            return failed(ErrorCode.CLIENT_APP_CRASHED, str(error))

    def ask(self, handler: str, run: Run, content: Any, most_s: float, unwanted: Callable[[], bool]) -> Answer:
        """The worker's answer, as `ResidentWorker.ask`."""
        node = dict(self.config) | {"run-id": run.run_id}
        return self.worker.ask((handler, overrides_of(run), node, content), most_s, unwanted)

    def fault_of(self, task: Task) -> str | None:
        """Why a run's code is not what this node has, if it is not; nothing of it is unpacked."""
        own = bundle.own_digest()
        try:
            theirs = bundle.digest(task.bundle)
        except ValueError as error:
            theirs = f"none ({error})"
        if theirs == own:
            return None
        return (
            f"this node runs its own code alone, whose bundle has the digest {own}; that of the run has {theirs}. "
            "Use the same version of the suite on the server and on every node"
        )

    # --- what its owner is told ---

    def tally_of(self, task: Task) -> Tally:
        """The run's tally; a run that is new is written down, with who asked for what."""
        run = task.run
        if self.tally is None or self.tally.run.run_id != run.run_id:
            self.say_ended()
            self.tally, self.link.bytes_sent, self.link.bytes_received = Tally(run), 0, 0
            who = printable(run.account_name or run.flwr_aid or "whoever reached the SuperLink")
            name = shlex.quote(printable(f"{run.fab_id} {run.fab_version} ({run.fab_hash[:16]})"))
            asked = printable(overrides_of(run))[:2000] or "none"
            log.info("run %s, submitted by %s: bundle %s, settings: %s", run.run_id, who, name, asked)
        return self.tally

    def shown(self, content: Any, tally: Tally) -> str:
        """What the terminal shows of a reply, which is taken down."""
        report: Any = content.metric_records.get("metrics", {})
        if "rows" in report:
            tally.rows_trained += int(report["rows"])
            tally.rows = int(report["num-examples"])
        return "".join(f", {name} {report[name]:.6g}" for name in SHOWN if name in report)

    def say_final(self, task: Task, answer: Answer, tally: Tally) -> None:
        """Three lines for this node's owner: where the adapter is, what it is worth here, what was sent."""
        tally.ended, config = True, task.message.content["config"]
        folders = list(answer.content["kept"]["folders"])
        where = f"; its adapter is in {folders[0]}" if folders else "; its adapter is not kept here: see --keep"
        sha256 = printable(str(config.get("final-sha256", "unknown")))
        log.info("run %s ended after %s rounds%s, SHA-256 %s", tally.run.run_id, config["rounds"], where, sha256)
        log.info("%s", self.losses(task.run))
        log.info("%s", self.traffic_line(tally))

    def losses(self, run: Run) -> str:
        try:
            answer = self.ask("losses", run, None, self.policy.max_seconds, lambda: False)
        except (GivenUp, Died) as error:
            answer = failed(ErrorCode.UNKNOWN, str(error))
        if answer.code:
            return f"held-out loss of this node's own rows: not measured ({answer.whole})"
        if not answer.content:
            return "held-out loss of this node's own rows: none are held out (by dataset.holdout, or --eval)"
        found: Any = answer.content["losses"]
        return (
            f"held-out loss of {found['rows']} rows that nobody trained on here: {found['before']:.4f} before, "
            f"{found['after']:.4f} after"
        )

    def say_ended(self) -> None:
        """Say that a run is over that handed nothing over: it failed or was stopped."""
        if self.tally and not self.tally.ended:
            self.tally.ended = True
            log.info("run %s ended without an adapter for this node: ask its coordinator", self.tally.run.run_id)
            log.info("%s", self.traffic_line(self.tally))

    def traffic_line(self, tally: Tally) -> str:
        sent, received = bytes_text(self.link.bytes_sent), bytes_text(self.link.bytes_received)
        used = min(tally.rows_trained, tally.rows)
        return f"trained on {used} of {tally.rows} rows; sent {sent} in {tally.messages} messages, received {received}"


def failed(code: int, text: str) -> Answer:
    return Answer(None, code, text, text)


def overrides_of(run: Run) -> str:
    return str(run.override_config.get(OVERRIDES, ""))
