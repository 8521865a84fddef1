"""`flower-client-app` and `flower-server-app`: thin starters of `flower-supernode` and `flwr run`.

Users know these names and Flower no longer ships them. Imports nothing heavy.
"""

import argparse
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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SUITE_FOLDER = Path(__file__).resolve().parent
SUPERLINK = "127.0.0.1:8000"
PARTITIONS = {"client": None, "client1": 0, "client2": 1}
REACH_S = 10.0


def client_command() -> int:
    """flower-client-app app:client1 [--insecure | --root-certificates F] [--superlink HOST:PORT] [node options]"""
    parser = argparse.ArgumentParser("flower-client-app", description="Start a SuperNode with a resident worker.")
    parser.add_argument("app", help="app:client1, app:client2 (partitions 0 and 1), or app:client")
    add_connection(parser)
    parser.add_argument("--partition-id", type=int, help="of app:client, from 0")
    parser.add_argument("--dataset", type=Path, help="this node's own rows: a JSON, JSONL, CSV or Parquet file")
    parser.add_argument("--model", type=Path, help="a local folder with the base model, instead of the Hub")
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


def run_or_say(command) -> int:
    try:
        return int(command())
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def check_connection(options: argparse.Namespace) -> None:
    """Warn of a connection without TLS; raise LaunchError if nobody answers within REACH_S seconds."""
    if options.insecure:
        print("warning: --insecure: adapters travel unencrypted and nobody proves who they are", file=sys.stderr)
    if options.root_certificates and not options.root_certificates.is_file():
        raise LaunchError(f"--root-certificates={options.root_certificates}: no such file")
    host, _, port = options.superlink.rpartition(":")
    if not host or not port.isdigit():
        raise LaunchError(f"--superlink={options.superlink}: use HOST:PORT, for example {SUPERLINK}")
    deadline = time.monotonic() + REACH_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"--superlink={options.superlink}: no SuperLink answers ({error.strerror or error}); start "
                    "flower-superlink first, or correct the address"
                ) from error
            time.sleep(0.5)


# --- client ---------------------------------------------------------------------------------------


def node_config(options: argparse.Namespace) -> str:
    """The SuperNode's --node-config: its partition, and the paths that only this machine may name."""
    name = options.app.removeprefix("app:")
    if not options.app.startswith("app:") or name not in PARTITIONS:
        raise LaunchError(f"{options.app}: use {', '.join('app:' + known for known in PARTITIONS)}")
    partition = options.partition_id if PARTITIONS[name] is None else PARTITIONS[name]
    if partition is None or partition < 0:
        raise LaunchError(f"{options.app}: needs --partition-id=NUMBER, from 0, different on every node")
    config = [f"partition-id={partition}"]
    for key in ("dataset", "model"):
        path = getattr(options, key)
        if path is not None:
            if not path.exists():
                raise LaunchError(f"--{key}={path}: no such file or folder")
            config.append(f"{key}={json.dumps(str(path.resolve()))}")
    return " ".join(config)


def start_node(options: argparse.Namespace, others: Sequence[str]) -> int:
    """Run a SuperNode until it ends or is told to, with a worker beside it that is restarted when it dies."""
    config = node_config(options)
    check_connection(options)
    security = ["--insecure"] if options.insecure else []
    if options.root_certificates:
        security = ["--root-certificates", str(options.root_certificates)]
    command = [tool("flower-supernode"), *security, "--superlink", options.superlink, "--node-config", config]
    with tempfile.TemporaryDirectory(prefix="flowertune-") as folder:  # mode 700: nobody else gets to the socket
        environment = os.environ | {
            "FLOWERTUNE_WORKER": str(Path(folder) / "worker"),
            "FLOWERTUNE_WORKER_KEY": secrets.token_hex(32),
        }
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        worker = start_worker(environment)
        node = subprocess.Popen([*command, "--port", str(free_port()), *others], env=environment)
        try:
            while node.poll() is None:
                if worker.poll() is not None:
                    print("warning: the worker died; starting another", file=sys.stderr)
                    Path(environment["FLOWERTUNE_WORKER"]).unlink(missing_ok=True)
                    worker = start_worker(environment)
                time.sleep(0.2)
            return node.returncode
        finally:
            end(node)
            end(worker)


def start_worker(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The resident worker; it ends when its standard input is closed, so it can not outlive this process."""
    return subprocess.Popen(
        [sys.executable, str(SUITE_FOLDER / "resident.py")], env=environment, cwd=SUITE_FOLDER, stdin=subprocess.PIPE
    )


def end(process: subprocess.Popen[bytes]) -> None:
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
    check_connection(options)
    with connection_folder(options) as environment:
        command = [
            tool("flwr"),
            "run",
            str(SUITE_FOLDER),
            "launcher",
            "--stream",
            "--run-config",
            f"overrides={json.dumps(shlex.join(options.overrides))}",
        ]
        run_id = show(command, environment)
        if run_id is None:
            raise LaunchError("the SuperLink took no run; its answer is above")
        status = run_status(run_id, environment)
    print(f"run {run_id}: {status}")
    return 0 if status == "finished:completed" else 1


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


def show(command: Sequence[str], environment: dict[str, str]) -> str | None:
    """Run `flwr run`, pass its output on, and return the run's id, which is part of it."""
    run_id = None
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"started run (\d+)", line):
                run_id = found[1]
    finally:
        end(process)  # type: ignore[arg-type]
    return run_id


def run_status(run_id: str, environment: dict[str, str]) -> str:
    """The run's status once it has ended, such as finished:completed or finished:failed."""
    command = [tool("flwr"), "list", "launcher", "--run-id", run_id, "--format", "json"]
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = re.search(r'"status": ?"([^"]+)"', done.stdout)
        if found is None:
            raise LaunchError(f"run {run_id}: its status can not be had ({(done.stdout + done.stderr).strip()[-200:]})")
        if found[1].startswith("finished"):
            return found[1]
        time.sleep(1)
