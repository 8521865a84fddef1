"""`flower-client-app` and `flower-server-app`: thin starters of `flower-supernode` and `flwr run`.

Users know these names and Flower no longer ships them. Imports nothing heavy.
"""

import argparse
import ctypes
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

SUITE_FOLDER = Path(__file__).resolve().parents[1]
sys.path.append(str(SUITE_FOLDER))  # the console scripts know this package alone

from settings.schema import SettingsError  # noqa: E402
from utils import send_nothing_home, shortened  # noqa: E402

SUPERLINK = "127.0.0.1:8000"
PARTITIONS = {"client": None, "client1": 0, "client2": 1}
REACH_S = 10.0
LEAVE_S = 15.0
EARLY_S, MOST_EARLY_DEATHS = 15.0, 3  # of a worker
PENDING_S = 20.0
PR_SET_PDEATHSIG = 1


def client_command() -> int:
    """flower-client-app app:client1 [--insecure | --root-certificates F] [--superlink HOST:PORT] [node options]"""
    parser = argparse.ArgumentParser("flower-client-app", description="Start a SuperNode with a resident worker.")
    parser.add_argument("app", help="app:client1, app:client2 (partitions 0 and 1), or app:client")
    add_connection(parser)
    parser.add_argument("--partition-id", type=int, help="of app:client, from 0")
    parser.add_argument("--dataset", type=Path, help="this node's own rows: a JSON, JSONL, CSV or Parquet file")
    parser.add_argument("--eval", type=Path, help="rows that nobody trains on, for dataset.eval_name")
    parser.add_argument("--category-column", help="a column of these rows whose values the server may learn")
    parser.add_argument("--model", type=Path, help="a local folder with the base model, instead of the Hub")
    parser.add_argument("--cache", type=Path, help="a folder in which the quantized base model is kept")
    options, others = parser.parse_known_args()
    return run_or_say(lambda: start_node(options, others))


def server_command() -> int:
    """flower-server-app app:server [--insecure | --root-certificates F] [--superlink HOST:PORT] [KEY=VALUE ...]"""
    parser = argparse.ArgumentParser("flower-server-app", description="Submit a run, show its log, wait for its end.")
    parser.add_argument("app", help="app:server")
    add_connection(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, as for main.py")
    options = parser.parse_intermixed_args()
    return run_or_say(lambda: submit(options))


def add_connection(parser: argparse.ArgumentParser) -> None:
    security = parser.add_mutually_exclusive_group()
    security.add_argument("--insecure", action="store_true", help="no TLS: only for trials on one machine")
    security.add_argument("--root-certificates", type=Path, metavar="FILE", help="PEM, to know the SuperLink by")
    parser.add_argument("--superlink", default=SUPERLINK, metavar="HOST:PORT")


class LaunchError(Exception):
    """What the user has to change, in one line."""


def run_or_say(command: Callable[[], int]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    send_nothing_home()
    try:
        return command()
    except (LaunchError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def check_connection(options: argparse.Namespace) -> None:
    """Warn of a connection without TLS; raise LaunchError if nobody answers within REACH_S seconds."""
    if options.insecure:
        print("warning: --insecure: adapters travel unencrypted and nobody proves who they are", file=sys.stderr)
    if options.root_certificates and not os.path.isfile(options.root_certificates):
        raise LaunchError(f"--root-certificates={options.root_certificates}: no such file")
    host, _, port = options.superlink.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise LaunchError(f"--superlink={options.superlink}: use HOST:PORT, for example {SUPERLINK}")
    deadline = time.monotonic() + REACH_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline or isinstance(error, ValueError):
                reason = getattr(error, "strerror", None) or error
                raise LaunchError(
                    f"--superlink={options.superlink}: no SuperLink answers ({reason}); start flower-superlink first, "
                    "or correct the address"
                ) from error
            time.sleep(0.5)


# --- client ---------------------------------------------------------------------------------------


def node_config(options: argparse.Namespace) -> str:
    """The SuperNode's --node-config: its partition, and the paths that only this machine may name."""
    name = options.app.removeprefix("app:")
    if not options.app.startswith("app:") or name not in PARTITIONS:
        raise LaunchError(f"{options.app}: use {', '.join('app:' + known for known in PARTITIONS)}")
    if PARTITIONS[name] is not None and options.partition_id is not None:
        raise LaunchError(f"--partition-id={options.partition_id}: {options.app} has its own; use app:client")
    partition = options.partition_id if PARTITIONS[name] is None else PARTITIONS[name]
    if partition is None or partition < 0:
        raise LaunchError(f"{options.app}: needs --partition-id=NUMBER, from 0, different on every node")
    config = [f"partition-id={partition}"]
    for key in ("dataset", "eval", "model", "cache"):
        path = getattr(options, key)
        if path is not None:
            if not os.path.exists(path):
                raise LaunchError(f"--{key}={path}: no such file or folder")
            config.append(f"{key}={toml_text(str(path.resolve()))}")
    if options.category_column:
        config.append(f"category-column={toml_text(options.category_column)}")
    return " ".join(config)


def toml_text(text: str) -> str:
    """`text` as a TOML string in the form that Flower's parser of KEY=VALUE lists knows: without escaped quotes."""
    return json.dumps(text, ensure_ascii=False).replace('\\"', "\\u0022")


def start_node(options: argparse.Namespace, others: Sequence[str]) -> int:
    """Run a SuperNode until it ends or is told to, with a worker beside it that is restarted when it dies."""
    if any(other.split("=")[0] == "--node-config" for other in others):
        raise LaunchError("--node-config: decided by this launcher; use --partition-id, --dataset, --eval and --model")
    config = node_config(options)
    check_connection(options)
    security = ["--insecure"] if options.insecure else []
    if options.root_certificates:
        security = ["--root-certificates", str(options.root_certificates)]
    command = [tool("flower-supernode"), *security, "--superlink", options.superlink, "--node-config", config]
    with private_folder() as folder:
        environment = os.environ | {
            "FLOWERTUNE_WORKER": str(Path(folder) / "worker"),
            "FLOWERTUNE_WORKER_KEY": secrets.token_hex(32),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds; Flower's default of 1 delays every message
        }
        worker, early_deaths = start_worker(environment), 0
        node = subprocess.Popen(
            [*command, "--port", str(free_port()), *others],
            env=environment,
            preexec_fn=end_with_parent,  # noqa: PLW1509
        )
        started = time.monotonic()
        try:
            while node.poll() is None:
                if worker.poll() is not None:
                    early_deaths = early_deaths + 1 if time.monotonic() - started < EARLY_S else 0
                    if early_deaths == MOST_EARLY_DEATHS:
                        print("error: the worker dies as soon as it starts; its reason is above", file=sys.stderr)
                        return 1
                    print("warning: the worker died; starting another", file=sys.stderr)
                    Path(environment["FLOWERTUNE_WORKER"]).unlink(missing_ok=True)
                    worker, started = start_worker(environment), time.monotonic()
                time.sleep(0.2)
            return node.returncode
        except KeyboardInterrupt:  # a terminal sends it to the SuperNode too, which takes its leave from the SuperLink
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                node.wait(LEAVE_S)
            raise
        finally:
            end(node)
            end(worker)


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that only this user can enter, with a path short enough for a Unix socket (107 bytes)."""
    short = len(os.fsencode(tempfile.gettempdir())) < 80
    return tempfile.TemporaryDirectory(prefix="flowertune-", dir=None if short else "/tmp")  # noqa: S108


def end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when the launcher is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start_worker(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The resident worker; it ends when its standard input is closed, so it cannot outlive this process."""
    return subprocess.Popen(
        [sys.executable, "-m", "deployment.resident"], env=environment, cwd=SUITE_FOLDER, stdin=subprocess.PIPE
    )


def end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    """A command of this Python environment, whether or not it is activated."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or name


# --- server ---------------------------------------------------------------------------------------


def submit(options: argparse.Namespace) -> int:
    """`flwr run --stream`, then the run's true status: 0 only if it finished as completed."""
    if options.app != "app:server":
        raise LaunchError(f"{options.app}: use app:server")
    for override in options.overrides:
        if "=" not in override:
            raise LaunchError(f"{override}: is not KEY=VALUE")
    given = with_settings_of_run(options.overrides)  # a wrong setting is answered here, not by a failed run
    check_connection(options)
    overrides = f"overrides={toml_text(shlex.join(given))}"
    command = [tool("flwr"), "run", str(SUITE_FOLDER), "launcher", "--stream", "--run-config", overrides]
    with connection_folder(options) as environment:
        run = Run(command, environment)
        try:
            run.show()
            if run.id is None:
                raise LaunchError("the SuperLink took no run; its answer is above")
            status = run_status(run.id, environment)
        except (KeyboardInterrupt, SystemExit):
            if run.id is not None:
                stop = [tool("flwr"), "stop", run.id, "launcher"]
                stopped = not subprocess.run(stop, env=environment, capture_output=True, check=False).returncode
                print(f"run {run.id}: {'stopped' if stopped else 'could not be stopped and goes on'}", flush=True)
            raise
    print(f"run {run.id}: {status}")
    return 0 if status == "finished:completed" else 1


def with_settings_of_run(overrides: Sequence[str]) -> list[str]:
    """`overrides`, checked; with `resume=FOLDER` those that make the settings of the run in FOLDER, if it is here."""
    from settings.compose import compose
    from settings.overrides import written
    from settings.resume import SETTINGS_FILE, differences

    config, default = compose(overrides, "deployment"), compose((), "deployment")
    if not config.resume or not (folder := Path(config.resume).resolve() / SETTINGS_FILE).exists():
        return list(overrides)
    wanted = differences(asdict(default), asdict(config) | {"resume": str(folder.parent)})
    return [f"{key}={written(value)}" for key, (_, value) in wanted.items()]


@contextmanager
def connection_folder(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """A Flower home with this one connection, so that the user's own is neither needed nor changed."""
    with tempfile.TemporaryDirectory(prefix="flowertune-") as home:
        lines = ["[superlink.launcher]", f"address = {json.dumps(options.superlink)}"]
        if options.insecure:
            lines.append("insecure = true")
        if options.root_certificates:
            lines.append(f"root-certificates = {json.dumps(str(options.root_certificates.resolve()))}")
        (Path(home) / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield os.environ | {"FLWR_HOME": home}


class Run:
    """`flwr run` as a process; `id` is known as soon as the SuperLink took the run."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.command, self.environment = command, environment
        self.id: str | None = None

    def show(self) -> None:
        """Pass the output on until the run ends."""
        process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then stops the run
        )
        assert process.stdout is not None
        pending = threading.Timer(PENDING_S, self.say_pending)
        pending.daemon = True
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if found := re.search(r"started run (\d+)", line):
                    self.id = found[1]
                    pending.start()
                elif self.id and "logstream" not in line:
                    pending.cancel()
        finally:
            pending.cancel()
            end(process)

    def say_pending(self) -> None:
        print(f"run {self.id} has not started yet; if this goes on, read the SuperLink's own log", flush=True)


def run_status(run_id: str, environment: dict[str, str]) -> str:
    """The run's status once it has ended, such as finished:completed or finished:failed."""
    command = [tool("flwr"), "list", "launcher", "--run-id", run_id, "--format", "json"]
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = re.search(r'"status": ?"([^"]+)"', done.stdout)
        if found is None:
            said = " ".join((done.stdout + done.stderr).split())
            reason = re.search(r'"error-message": ?"(.*?)"', said)
            why = shortened(reason[1] if reason else said, 200)
            raise LaunchError(f"run {run_id}: its status is not known ({why})")
        if found[1].startswith("finished"):
            return found[1]
        time.sleep(1)
