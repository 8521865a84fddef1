"""A node's resident worker: one process beside a SuperNode that keeps base model, rows and trainer.

The processes that Flower starts for each message hand their work over through a Unix socket in a folder
that only this user can enter; both sides prove that they know a key. Without a worker (a plain
`flower-supernode`) the work is done in the message's own process, only slower.
"""

import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from machine import gpus
from settings.schema import RunError, SettingsError, WorkerError

SOCKET_VARIABLE, KEY_VARIABLE = "FLOWERTUNE_WORKER", "FLOWERTUNE_WORKER_KEY"
PARTITIONERS = re.compile(r"flwr_datasets\.partitioner\.[A-Z]\w*")
# KEY=VALUE of this suite: no hydra.* and no ${...}, which could read this machine's files and environment
SAFE_OVERRIDE = re.compile(r"\+{0,2}(?!hydra)[a-z][\w./]*=[^$/~][^$]*")
CONNECT_S = 60.0


class OtherGpusError(Exception):
    """A run needs other GPUs than this process sees: only a new process can."""


def call(name: str, overrides: str, node: Mapping[str, Any], content: Any) -> Any:
    """The RecordDict with which the handler `name` of client.py answers `content` on this node.

    Raises:
        SettingsError, RunError: as the handler raised it, with one line.
        RuntimeError: with the worker's traceback, if the handler failed otherwise.
        ConnectionError, EOFError: if the worker is gone; its launcher starts another.
    """
    if SOCKET_VARIABLE not in os.environ:
        return work(name, overrides, node, content)
    while (reply := ask(name, overrides, node, content)) is None:
        pass
    succeeded, result = reply
    if not succeeded:
        raise result if isinstance(result, SettingsError | RunError) else RuntimeError(result)
    return result


def ask(name: str, overrides: str, node: Mapping[str, Any], content: Any) -> tuple[bool, Any] | None:
    """What the worker answers; None if it starts anew first, and has to be asked again."""
    with connect() as connection:
        connection.send((name, overrides, dict(node), content))
        reply: tuple[bool, Any] | None = connection.recv()
    return reply


def connect() -> Connection:
    """A connection to the worker, which may be starting just now."""
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            return Client(os.environ[SOCKET_VARIABLE], "AF_UNIX", bytes.fromhex(os.environ[KEY_VARIABLE]))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def work(name: str, overrides: str, node: Mapping[str, Any], content: Any) -> Any:
    """Run a handler in this process. Raises OtherGpusError if it sees other GPUs than the run needs."""
    config, own_rows = node_settings(overrides, node)
    see_gpu(config.client_resources.num_gpus)
    from utils import quiet_libraries

    quiet_libraries()
    import client

    site = client.Site(config, own_rows, is_resident=SOCKET_VARIABLE in os.environ)
    return client.handle(name, site, content, int(node["partition-id"]))


def see_gpu(num_gpus: float) -> None:
    """Let this process see the first of the node's GPUs, or none if the run's clients train on the CPU."""
    wanted = gpus.first() if num_gpus else []
    has_looked = SOCKET_VARIABLE in os.environ and "torch" in sys.modules
    if has_looked and os.environ.get(gpus.VARIABLE) != ",".join(wanted):
        raise OtherGpusError
    gpus.show(wanted)


def node_settings(overrides: str, node: Mapping[str, Any]) -> tuple[Any, bool]:
    """The run's settings as this node accepts them, and whether the rows are the node's own.

    What is read on this machine is decided here: the server may name a Hub id or what the suite ships,
    never a path, a class to import, or code to trust. The node's config names local files: `dataset`
    (its own rows), `eval` (a held-out set), `model` (a folder of base weights) and `cache` (for the quantized model);
    `category-column` names the one column whose values the server may learn.

    Raises:
        SettingsError: if the server asks for more.
    """
    from settings.compose import compose
    from settings.resume import RESUME
    from settings.schema import HUB_ID, SHIPPED_NAMES
    from utils import shipped_path

    given = [text for text in shlex.split(overrides) if not RESUME.match(text)]  # that is the server's business
    for override in given:
        if not SAFE_OVERRIDE.fullmatch(override) or ".." in override:
            raise SettingsError(f"{override}: not a setting that a server may make on a node")
    config = compose(given, "deployment")
    named: list[tuple[Any, str, str]] = [
        (config.dataset, "name", "dataset"),
        (config.dataset, "eval_name", "eval"),
        (config.model, "name", "model"),
    ]
    for part, field, key in named:
        name = getattr(part, field)
        if key in node:
            setattr(part, field, str(node[key]))
        elif name in SHIPPED_NAMES:
            setattr(part, field, str(shipped_path(name)))
        elif name is not None and (not HUB_ID.fullmatch(name) or Path(name).exists() or shipped_path(name)):
            raise SettingsError(
                f"{'model' if part is config.model else 'dataset'}.{field}={name}: a server can name a Hub id, "
                f"OWNER/NAME, and no path on this node; set {key} in the node's config"
            )
    config.model.cache_folder = str(node["cache"]) if "cache" in node else None
    if "dataset" in node or "eval" in node:  # the server learns the column's values: it could name the answers
        config.dataset.category_column = str(node.get("category-column", ""))
        config.dataset.columns = {}  # the server does not choose what of a node's own rows is trained
    template = config.dataset.template
    if template != "tokenizer" and not shipped_path(f"conf/template/{template}.jinja"):
        raise SettingsError(f"dataset.template={template}: on a node, use a template of the suite")
    if any(os.sep in text for text in texts([config.train.training_arguments, config.model.lora])):
        raise SettingsError("train.training_arguments or model.lora: a server cannot name a path on this node")
    if not PARTITIONERS.fullmatch(config.dataset.partitioner["_target_"]):
        raise SettingsError("dataset.partitioner._target_: on a node, use one of flwr_datasets.partitioner")
    if config.model.trust_remote_code:
        raise SettingsError("model.trust_remote_code=true: a node does not run a model repository's code")
    return config, "dataset" in node


def texts(value: Any) -> Iterator[str]:
    """Every string inside `value`, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts(list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)


def serve(socket: str, key: bytes) -> None:
    """Answer one connection after the other until standard input, held by the launcher, is closed.

    For a run that needs other GPUs this process starts itself anew.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's business
    threading.Thread(target=leave_with_launcher, args=[Path(socket).parent], daemon=True).start()
    with Listener(socket, "AF_UNIX", authkey=key) as listener:
        fits = True
        while fits:
            try:
                with listener.accept() as connection:
                    fits = answer(connection)
            except (OSError, EOFError, AuthenticationError) as error:
                print(f"warning: a caller went away or did not know the key: {error!r}", file=sys.stderr, flush=True)
    gpus.show_given()
    os.execv(sys.executable, [sys.executable, "-m", "deployment.resident"])  # noqa: S606  with the environment it had


def answer(connection: Connection) -> bool:
    """Answer one caller; returns whether this process can go on with what it sees of the node's GPUs."""
    name, overrides, node, content = connection.recv()
    start = time.perf_counter()
    reply: tuple[bool, Any]
    try:
        reply = True, work(name, overrides, node, content)
        said = "".join(f", {key} {value:.6g}" for key, value in shown(reply[1]))
    except OtherGpusError:
        connection.send(None)
        return False
    except (SettingsError, RunError) as error:
        reply, said = (False, error), f", failed: {error}"
    except Exception:  # the caller reports it
        reply = False, traceback.format_exc()
        said = f", failed: {reply[1].strip().splitlines()[-1]}"
    print(f"{name}, partition {node['partition-id']}: {time.perf_counter() - start:.1f} s{said}", flush=True)
    connection.send(reply)
    if isinstance(reply[1], WorkerError):
        os._exit(1)  # the launcher starts another
    return True


def shown(reply: RecordDict) -> Iterator[tuple[str, Any]]:
    """What a node's terminal shows of a reply."""
    if "metrics" in reply.metric_records:
        report = reply.metric_records["metrics"]
        yield from ((name, report[name]) for name in ("rows", "train_loss", "eval_loss") if name in report)


def leave_with_launcher(folder: Path) -> None:
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)  # in case that the launcher was killed
    os._exit(0)


if __name__ == "__main__":
    serve(os.environ[SOCKET_VARIABLE], bytes.fromhex(os.environ[KEY_VARIABLE]))
