"""`flower-server-app`: submit a run, show its log, wait for its end, and say how it ended."""

import argparse
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployment.connection import LaunchError, Outage, check_connection, connection_folder, exposed_at
from utils import printable, shortened

SUITE_FOLDER = Path(__file__).resolve().parents[1]
FOLDER = "folder: "  # what the run's log says of its run folder, see app.py
PENDING_S = 20.0
LOOK_S, LOST_S = 2.0, 10.0  # the SuperLink is looked for so often, and taken for gone after so long
COMPLETED = "finished:completed"


def submit(options: argparse.Namespace) -> int:
    """`flwr run --stream`, then the run's true status: 0 only if it finished as completed.

    Raises:
        LaunchError, SettingsError: for what has to be changed.
        Outage: if the SuperLink is not there, or goes.
    """
    if options.app != "app:server":
        raise LaunchError(f"{options.app}: use app:server")
    for override in options.overrides:
        if "=" not in override:
            raise LaunchError(f"{override}: is not KEY=VALUE")
    given = with_settings_of_run(options.overrides)  # a wrong setting is answered here, not by a failed run
    check_connection(options)
    if address := exposed_at(options):
        print(f"warning: {EXPOSED.format(address)}", file=sys.stderr)
    overrides = f"overrides={toml_text(shlex.join(given))}"
    command = [tool("flwr"), "run", str(SUITE_FOLDER), "launcher", "--stream", "--run-config", overrides]
    with connection_folder(options) as environment:
        run = Run(command, environment, options)
        try:
            run.show()
            status = run_status(run.id, environment) if run.id else "not started"
        except (KeyboardInterrupt, SystemExit):
            if run.id is not None:
                stop = [tool("flwr"), "stop", run.id, "launcher"]
                stopped = not subprocess.run(stop, env=environment, capture_output=True, check=False).returncode
                print(f"run {run.id}: {'stopped' if stopped else 'could not be stopped and goes on'}", flush=True)
                run.say_how_to_resume()
            raise
        except Outage:
            run.say_how_to_resume()
            raise
    if run.id is None:
        raise Outage("the SuperLink took no run; its answer is above")
    if status == COMPLETED:
        print(f"run {run.id}: {status}")
        return 0
    if not run.gave_reason:
        print("error: the run's process on the server ended without a word: it was killed, or out of memory")
    run.say_how_to_resume()
    print(f"run {run.id}: {status}", flush=True)
    return 1


EXPOSED = (
    "{}: whoever reaches this address can submit runs, stop them and register nodes; let the SuperLink listen on "
    "127.0.0.1 behind a proxy for nodes alone, see docs/deployment.md"
)


def with_settings_of_run(overrides: Sequence[str]) -> list[str]:
    """`overrides`, checked; with `resume=FOLDER` those that make the settings of the run in FOLDER, if it is here."""
    from settings.compose import compose
    from settings.overrides import written
    from settings.resume import SETTINGS_FILE, differences

    config, default = compose(overrides, "deployment"), compose((), "deployment")
    if not config.resume or not (folder := Path(config.resume).resolve() / SETTINGS_FILE).exists():
        return list(overrides)
    wanted = differences(asdict(default), asdict(config) | {"resume": str(folder.parent)})
    return [f"{key}={written(value)}" for key, _, value in wanted]


class Run:
    """`flwr run` as a process; `id` is known as soon as the SuperLink took the run."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], options: argparse.Namespace) -> None:
        self.command, self.environment, self.options = command, environment, options
        self.id: str | None = None
        self.folder: str | None = None  # as the run's own log names it, on the SuperLink's machine
        self.gave_reason = self.is_lost = self.says_how = False

    def show(self) -> None:
        """Pass the output on until the run ends.

        Raises:
            Outage: if the SuperLink is gone.
        """
        process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this process, which then stops the run
        )
        assert process.stdout is not None
        pending = threading.Timer(PENDING_S, self.say_pending)
        pending.daemon = True
        ended = threading.Event()
        threading.Thread(target=self.look_for_superlink, args=[process, ended], daemon=True).start()
        try:
            for line in process.stdout:
                print(printable(line), end="", flush=True)
                self.note(line)
                if found := re.search(r"started run (\d+)", line):
                    self.id = found[1]
                    pending.start()
                elif self.id and "logstream" not in line:
                    pending.cancel()
        finally:
            ended.set()
            pending.cancel()
            end(process)
        if self.is_lost:
            raise Outage(f"--superlink={self.options.superlink}: the SuperLink is gone, and the run with it")

    def note(self, line: str) -> None:
        """Take down what a line of the log says of the run's folder and of its end."""
        if line.startswith(FOLDER):
            self.folder = line.removeprefix(FOLDER).strip()
        self.gave_reason |= line.startswith("error: ")
        self.says_how |= line.startswith("log: ")

    def look_for_superlink(self, process: subprocess.Popen[str], ended: threading.Event) -> None:
        """End the stream when nobody listens there any more: a SuperLink that is told to end waits for its readers."""
        host, _, port = self.options.superlink.rpartition(":")
        seen = time.monotonic()
        while not ended.wait(LOOK_S):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_S).close()
                seen = time.monotonic()
            except OSError:
                if time.monotonic() - seen > LOST_S:
                    self.is_lost = True
                    process.terminate()
                    return

    def say_pending(self) -> None:
        print(f"run {self.id} has not started yet; if this goes on, read the SuperLink's own log", flush=True)

    def say_how_to_resume(self) -> None:
        """Say where the results are, and what to type to resume; as far as this machine knows."""
        if self.folder is None or self.says_how:
            return
        from runs.runfolder import rounds_in

        print(f"log: {self.folder}/main.log")
        if rounds_in(Path(self.folder)) or not Path(self.folder).is_dir():
            security = ["--insecure"] if self.options.insecure else []
            if self.options.root_certificates:
                security = [f"--root-certificates={self.options.root_certificates}"]
            words = ["app:server", *security, f"--superlink={self.options.superlink}", f"resume={self.folder}"]
            print(f"to resume: flower-server-app {shlex.join(words)}", flush=True)


def run_status(run_id: str, environment: dict[str, str]) -> str:
    """The run's status once it has ended, such as finished:completed or finished:failed.

    Raises:
        Outage: if the SuperLink does not say it.
    """
    command = [tool("flwr"), "list", "launcher", "--run-id", run_id, "--format", "json"]
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = re.search(r'"status": ?"([^"]+)"', done.stdout)
        if found is None:
            said = " ".join((done.stdout + done.stderr).split())
            reason = re.search(r'"error-message": ?"(.*?)"', said)
            why = shortened(reason[1] if reason else said, 200)
            raise Outage(f"run {run_id}: its status is not known ({why})")
        if found[1].startswith("finished"):
            return found[1]
        time.sleep(1)


def end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tool(name: str) -> str:
    """A command of this Python environment, whether or not it is activated."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or name


def toml_text(text: str) -> str:
    """`text` as a TOML string in the form that Flower's parser of KEY=VALUE lists knows: without escaped quotes."""
    return json.dumps(text, ensure_ascii=False).replace('\\"', "\\u0022")
