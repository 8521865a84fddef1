"""`flower-server-app`: submit a run, show its log, wait for its end, and say how it ended.

Speaks Flower's Control API, as `flwr run`, `flwr log`, `flwr list` and `flwr stop` do.
"""

import argparse
import hashlib
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import httpx
from click import ClickException
from flwr.cli.build import build_fab_from_disk
from flwr.cli.utils import flwr_cli_exc_handler
from flwr.common.constant import Status
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest, StreamLogsRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from deployment.connection import check_connection, client_of, exposed_at, fault_at
from runs.runfolder import rounds_in
from settings.compose import compose
from settings.overrides import written
from settings.resume import SETTINGS_FILE, differences
from settings.schema import RunError, SettingsError
from utils import SUITE_FOLDER, printable, shortened

FOLDER = "folder: "  # what the run's log says of its run folder, see app.py
PENDING_S = 20.0
LOOK_S, LOST_S = 2.0, 10.0  # the SuperLink is looked for so often, and taken for gone after so long
COMPLETED = "finished:completed"
EXPOSED = (
    "{}: whoever reaches this address can submit runs, stop them and register nodes; let the SuperLink listen on "
    "127.0.0.1 behind a proxy for nodes alone, see docs/deployment.md"
)


def submit(options: argparse.Namespace) -> int:
    """A run from its start to its end; 0 only if it finished as completed.

    Raises SettingsError for what has to be changed, and RunError if the SuperLink is not there, or goes.
    """
    if options.app != "app:server":
        raise SettingsError(f"{options.app}: use app:server")
    for override in options.overrides:
        if "=" not in override:
            raise SettingsError(f"{override}: is not KEY=VALUE")
    given = with_settings_of_run(options.overrides)  # a wrong setting is answered here, not by a failed run
    check_connection(options)
    if address := exposed_at(options):
        print(f"warning: {EXPOSED.format(address)}", file=sys.stderr)
    run = Run(options)
    run.start(shlex.join(given))
    try:
        run.follow()
        status = run.status()
    except (KeyboardInterrupt, SystemExit, RunError) as end:
        if not isinstance(end, RunError):
            run.stop()
        run.say_how_to_resume()
        raise
    if status == COMPLETED:
        print(f"run {run.id}: {status}")
        return 0
    if not run.gave_reason:
        print("error: the run's process on the server ended without a word: it was killed, or out of memory")
    run.say_how_to_resume()
    print(f"run {run.id}: {status}", flush=True)
    return 1


def with_settings_of_run(overrides: Sequence[str]) -> list[str]:
    """`overrides`, checked; with `resume=FOLDER` those that make the settings of the run in FOLDER, if it is here."""
    config, default = compose(overrides, "deployment"), compose((), "deployment")
    if not config.resume or not (folder := Path(config.resume).resolve() / SETTINGS_FILE).exists():
        return list(overrides)
    wanted = differences(asdict(default), asdict(config) | {"resume": str(folder.parent)})
    return [f"{key}={written(value)}" for key, _, value in wanted]


class Run:
    """A run on the SuperLink, as whoever submits it sees it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.client = client_of(ControlHttpClient, options, RuntimeVersionHttpInterceptor("flwr CLI"))
        self.id = 0
        self.folder: str | None = None  # as the run's own log names it, on the SuperLink's machine
        self.has_log = self.gave_reason = self.says_how = False

    def start(self, overrides: str) -> None:
        """Raises RunError if this folder cannot be packed, or the SuperLink does not take it."""
        config = user_config_to_proto({"overrides": overrides})
        try:
            bundle = build_fab_from_disk(SUITE_FOLDER)
            fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
            with flwr_cli_exc_handler():
                self.id = self.client.StartRun(StartRunRequest(fab=fab, override_config=config)).run_id
        except (ClickException, ValueError) as error:
            raise RunError(f"the SuperLink took no run: {shortened(error, 300)}") from error
        print(f"run {self.id} started", flush=True)

    def follow(self) -> None:
        """Show the log until the run ends, or nobody listens there any more (RunError).

        A SuperLink that is told to end waits for its readers, so the log alone does not say it.
        """
        reader = threading.Thread(target=self.show_log, daemon=True)
        reader.start()
        seen, pending_until = time.monotonic(), time.monotonic() + PENDING_S
        while reader.is_alive():
            reader.join(LOOK_S)
            now = time.monotonic()
            if not fault_at(self.options.superlink):
                seen = now
            elif now - seen > LOST_S:
                raise RunError(f"--superlink={self.options.superlink}: the SuperLink is gone, and the run with it")
            if now > pending_until and not self.has_log:
                pending_until = float("inf")
                print(f"run {self.id} has not started yet; if this goes on, read the SuperLink's own log", flush=True)

    def show_log(self) -> None:
        """Pass the run's log on, and take down what it says of the run's folder and of its end."""
        try:
            for line in self.log():
                self.has_log = True
                print(printable(line), flush=True)
                if line.startswith(FOLDER):
                    self.folder = line.removeprefix(FOLDER).strip()
                self.gave_reason |= line.startswith("error: ")
                self.says_how |= line.startswith("log: ")
        except (httpx.HTTPError, ValueError) as error:
            self.gave_reason = True  # for all that is known here
            reason = shortened(error, 200) or type(error).__name__
            print(f"warning: the log of run {self.id} cannot be read any further ({reason})", file=sys.stderr)

    def log(self) -> Iterator[str]:
        """Its lines, as they come."""
        rest = ""
        for part in self.client.StreamLogs(StreamLogsRequest(run_id=self.id)):
            *lines, rest = (rest + part.log_output).replace("\r", "\n").split("\n")
            yield from lines
        if rest:
            yield rest

    def status(self) -> str:
        """How the run ended, such as finished:completed or finished:failed. Raises RunError if nobody says it."""
        while True:
            try:
                with flwr_cli_exc_handler():
                    [run] = self.client.ListRuns(ListRunsRequest(run_id=self.id)).run_dict.values()
            except (ClickException, ValueError) as error:
                raise RunError(f"run {self.id}: its status is not known ({shortened(error, 200)})") from error
            if run.status.status == Status.FINISHED:
                return f"{run.status.status}:{run.status.sub_status}"
            time.sleep(1)

    def stop(self) -> None:
        try:
            stopped = self.client.StopRun(StopRunRequest(run_id=self.id)).success
        except (httpx.HTTPError, ValueError):
            stopped = False
        print(f"run {self.id}: {'stopped' if stopped else 'could not be stopped and goes on'}", flush=True)

    def say_how_to_resume(self) -> None:
        """Say where the results are, and what to type to resume; as far as this machine knows."""
        if self.folder is None or self.says_how:
            return
        print(f"log: {self.folder}/main.log")
        if rounds_in(Path(self.folder)) or not Path(self.folder).is_dir():
            security = ["--insecure"] if self.options.insecure else []
            if self.options.root_certificates:
                security = [f"--root-certificates={self.options.root_certificates}"]
            words = ["app:server", *security, f"--superlink={self.options.superlink}", f"resume={self.folder}"]
            print(f"to resume: flower-server-app {shlex.join(words)}", flush=True)
