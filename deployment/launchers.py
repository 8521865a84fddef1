"""`flower-client-app` and `flower-server-app`: a node of a federation, and the submission of a run.

Users know these names and Flower no longer ships them. Imports nothing heavy.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the console scripts know this package alone

from deployment.connection import add_connection, check_connection  # noqa: E402
from settings.policy import read_policy  # noqa: E402
from settings.schema import RunError, SettingsError  # noqa: E402
from utils import printable, send_nothing_home  # noqa: E402

FAILED, WRONG = 1, 2  # exit codes: of what may work another time, and of what has to be changed
PARTITIONS = {"client": None, "client1": 0, "client2": 1}
MOST_NAME = 60


def client_command() -> int:
    """flower-client-app app:client1 [--insecure | --root-certificates F] [--superlink HOST:PORT] [node options]"""
    parser = argparse.ArgumentParser("flower-client-app", description="Be a node of a federation.")
    parser.add_argument("app", help="app:client1, app:client2 (partitions 0 and 1), or app:client")
    add_connection(parser)
    parser.add_argument("--partition-id", type=int, help="of app:client, from 0")
    parser.add_argument("--dataset", type=Path, help="this node's own rows: a JSON, JSONL, CSV or Parquet file")
    parser.add_argument("--eval", type=Path, help="rows that nobody trains on, for dataset.eval_name")
    parser.add_argument("--category-column", help="a column of these rows whose values the server may learn")
    parser.add_argument("--model", type=Path, help="a local folder with the base model, instead of the Hub")
    parser.add_argument("--cache", type=Path, help="a folder in which the quantized base model is kept")
    parser.add_argument("--name", help="how this site is called on the server's terminal and in its log")
    parser.add_argument("--policy", type=Path, metavar="FILE", help="what a server may ask: see conf/policy.yaml")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the adapters that runs end with, and a log, go")
    parser.add_argument("--auth-supernode-private-key", type=Path, metavar="FILE", help="what this node is known by")
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


def submit(options: argparse.Namespace) -> int:
    from deployment import submission

    return submission.submit(options)


def run_or_say(command: Callable[[], int]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    send_nothing_home()
    try:
        return command()
    except (SettingsError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED if isinstance(error, RunError) else WRONG
    except KeyboardInterrupt:
        return 130


def node_config(options: argparse.Namespace) -> dict[str, Any]:
    """What this node knows of itself: its partition, its name, and the paths that only this machine may name."""
    name = options.app.removeprefix("app:")
    if not options.app.startswith("app:") or name not in PARTITIONS:
        raise SettingsError(f"{options.app}: use {', '.join('app:' + known for known in PARTITIONS)}")
    own = PARTITIONS[name]
    if None not in (own, options.partition_id):
        raise SettingsError(f"--partition-id={options.partition_id}: {options.app} has its own; use app:client")
    partition = options.partition_id if own is None else own
    if partition is None or partition < 0:
        raise SettingsError(f"{options.app}: needs --partition-id=NUMBER, from 0, different on every node")
    config: dict[str, Any] = {"partition-id": partition, "resident": True}
    for key in ("dataset", "eval", "model", "cache", "policy"):
        path = getattr(options, key)
        if path is not None:
            if not os.path.exists(path):
                raise SettingsError(f"--{key}={path}: no such file or folder")
            config[key] = str(path.resolve())
    if options.keep:
        config["keep"] = str(writable(options.keep))
    if options.name:
        if len(options.name) > MOST_NAME or not options.name.isprintable():
            raise SettingsError(f"--name={options.name!r}: use at most {MOST_NAME} printable characters")
        config["name"] = options.name
    if options.category_column:
        config["category-column"] = options.category_column
    return config


def writable(folder: Path) -> Path:
    """`--keep`, made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder.resolve()
    except OSError as error:
        raise SettingsError(f"--keep={folder}: cannot be written ({error.strerror}); choose another folder") from error


def start_node(options: argparse.Namespace, others: list[str]) -> int:
    """Be a node until told to end, with a worker beside it. `others` are options that there are not."""
    if others:
        raise SettingsError(f"{others[0]}: there is no such option; flower-client-app --help names them")
    config = node_config(options)
    policy = read_policy(options.policy)
    path = options.auth_supernode_private_key
    if path and options.insecure:
        raise SettingsError("--auth-supernode-private-key: needs TLS; use --root-certificates=FILE, not --insecure")
    from deployment.link import Link, NotAccepted, read_key, rows_key
    from deployment.node import Node, log
    from deployment.resident import Died, ResidentWorker

    if key := read_key(path) if path else None:
        config["rows-key"] = rows_key(key)
    check_connection(options)
    os.umask(0o077)  # nothing that this node writes is for others
    log_to(log, config.get("keep"))
    who = f" ({config['name']})" if "name" in config else ""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="flowertune-") as private,
            ResidentWorker(worker_environment(private, config)) as worker,
            Link(options, key, log.warning) as link,
        ):
            log.info("node %s%s, partition %s: waiting for runs", link.node.node_id, who, config["partition-id"])
            Node(link, worker, config, policy).play()
    except (NotAccepted, Died) as error:
        log.error("error: %s", error)
    return FAILED


def worker_environment(private: str, config: dict[str, Any]) -> dict[str, str]:
    """Where the rows are this node's own, what is made of them on its disk stays private, and ends with it."""
    own = {"HF_DATASETS_CACHE": private, "TMPDIR": private} if "dataset" in config or "eval" in config else {}
    return os.environ | {"FLOWERTUNE_PRIVATE": private} | own


class Printable(logging.Formatter):
    """Lines with the time; whatever others sent cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to(log: logging.Logger, keep: str | None) -> None:
    """Let `log` write to the terminal, and to node.log in `keep`."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if keep:
        handlers.append(logging.FileHandler(Path(keep) / "node.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(Printable("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
