"""The engine of a simulation: a Flower Grid whose messages are answered by resident worker processes.

A client is only a partition id and a worker serves whichever comes next, so 10,000 clients cost no more
than 20. Workers are processes of this machine, or actors of a Ray cluster. One that dies or is too late
is replaced, and the message that it held is answered with an error. Imports nothing heavy: workers
import the model libraries while the driver is still checking the run.
"""

import gc
import logging
import multiprocessing
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from exchange.faults import WORKER_DIED
from runs.stopping import SIGNALS
from settings.schema import ClientResources, RunConfig, RunError, SettingsError
from utils import SUITE_FOLDER, shortened

if TYPE_CHECKING:
    from client import Site

log = logging.getLogger(__name__)

LEAVE_S = 2.0
OFFLINE = "HF_HUB_OFFLINE"
starting = threading.Lock()  # of processes: their environment is this one's


class WorkerDied(Exception):
    """A worker ended, or had to be ended, before it answered; it has been replaced."""


class Worker(Protocol):
    """One resident process: answers messages one after the other."""

    def answer(self, message: Message, partition_id: int, timeout_s: float) -> Message: ...
    def stop(self) -> None: ...


class WorkerGrid(Grid):
    """Flower's Grid over `workers`. Node n is the client of partition n - 1."""

    poll_s = 0.02  # how long the server waits before it asks for replies again

    def __init__(self, workers: Sequence[Worker], num_clients: int) -> None:
        identify_as_flower_task()
        self.workers, self.num_clients, self.closing = workers, num_clients, False
        self.questions: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.replies: dict[str, Message] = {}
        self.threads = [threading.Thread(target=self._drive, args=[worker], daemon=True) for worker in workers]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """End all workers, whatever they are doing; none is left when this returns."""
        self.closing = True
        for _ in self.workers:
            self.questions.put(None)
        for worker in self.workers:
            worker.stop()
        for thread in self.threads:
            thread.join(10)

    def _drive(self, worker: Worker) -> None:
        """Hand message after message to `worker`."""
        while (message := self.questions.get()) is not None:
            left_s = message.metadata.created_at + message.metadata.ttl - time.time()
            try:
                if left_s <= 0:
                    raise WorkerDied("no worker was free in time")
                reply = worker.answer(message, message.metadata.dst_node_id - 1, left_s)
            except Exception as error:  # the server must learn of it, or it would wait
                if not self.closing:
                    log.error("client %s: %r", message.metadata.dst_node_id - 1, error)
                reply = Message(Error(WORKER_DIED, str(error)), reply_to=message)
            if message.metadata.created_at + message.metadata.ttl > time.time():  # else nobody waits for it any more
                self.replies[message.metadata.message_id] = reply

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue `messages`; returns their ids."""
        names = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            names.append(message.metadata.message_id)
            self.questions.put(message)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to `message_ids` that are there; each is given out once."""
        return [self.replies.pop(name) for name in list(message_ids) if name in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then wait for all replies or `timeout` seconds."""
        waiting, replies = set(self.push_messages(messages)), []
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting and time.monotonic() < deadline:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.01)
        return replies

    def get_node_ids(self) -> Sequence[int]:
        """All clients are always there."""
        return range(1, self.num_clients + 1)

    def set_run(self, run: Any) -> None:
        """There is one run."""

    @property
    def run(self) -> Any:
        raise NotImplementedError("a simulation has no run record")

    def create_message(self, *_: Any, **__: Any) -> Message:
        """Deprecated in Flower."""
        raise NotImplementedError("use flwr.app.Message")


def identify_as_flower_task() -> None:
    """What Flower's runtimes set before an app runs: who sends the messages that are made in this process."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


@contextmanager
def worker_grid(site: "Site") -> Iterator[WorkerGrid]:
    """A grid with as many workers as fit, and no more than clients that work at the same time.

    Raises:
        SettingsError: if `ray.address` is not a cluster's.
    """
    grid = WorkerGrid(start_actors(site) if site.config.ray.address else start_workers(site), site.config.num_clients)
    try:
        yield grid
    finally:
        grid.close()
        if site.config.ray.address:
            import ray

            ray.shutdown()


def most_workers(config: RunConfig) -> int:
    """Clients that may work at the same time."""
    counts = (config.evaluations_after(number, config.num_clients) for number in (0, 1))
    return max(config.clients_per_round, *counts)


def gpu_shares(resources: ClientResources) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker that this machine's GPUs have room for.

    Workers of half a GPU share one; a worker of two GPUs sees two (and trains on the first).
    """
    import torch

    given, count = os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count()
    devices = given.split(",")[:count] if given else [str(index) for index in range(count)]
    if resources.num_gpus < 1:
        return [device for device in devices for _ in range(int(1 / resources.num_gpus + 1e-9))]
    each = int(resources.num_gpus)
    return [",".join(devices[start : start + each]) for start in range(0, len(devices) - each + 1, each)]


# --- processes of this machine --------------------------------------------------------------------


def check_machine(config: RunConfig) -> None:
    """Raise SettingsError if not one worker fits into this machine; a Ray cluster is left to Ray."""
    wanted, cpus = config.client_resources, os.cpu_count() or 1
    if config.ray.address:
        return
    wrong: list[tuple[str, str, str]] = []  # what was asked for, what there is, what to set
    if wanted.num_cpus > cpus:
        wrong.append((f"client_resources.num_cpus={wanted.num_cpus}", f"{cpus} CPU cores", f"num_cpus={cpus}"))
    if wanted.num_gpus and not gpu_shares(wanted):
        import torch

        gpus = torch.cuda.device_count()
        instead = f"num_gpus={gpus}" + ("" if gpus else " (to train on the CPU)")
        wrong.append((f"client_resources.num_gpus={wanted.num_gpus:g}", f"{gpus} GPUs", instead))
    if wrong:
        asked, there, instead_of_them = zip(*wrong, strict=True)
        raise SettingsError(
            f"{', '.join(asked)}: this machine has {' and '.join(there)}; set "
            f"{' '.join(f'client_resources.{setting}' for setting in instead_of_them)}"
        )


def warm_up(config: RunConfig, log_file: Path) -> None:
    """Import the workers' libraries in a process from which CPU workers are forked, beside the driver's own work.

    A CUDA context does not survive a fork, so workers with a GPU are started afresh and import on their own.
    """
    if config.client_resources.num_gpus or config.ray.address:
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SUITE_FOLDER), os.environ.get("PYTHONPATH")]))
    forkserver.set_forkserver_preload(["client"])
    # inherited: signals are the driver's business, even if they go to the whole process group
    handlers = {which: signal.signal(which, signal.SIG_IGN) for which in SIGNALS}
    terminal = os.dup(1), os.dup(2)
    try:
        output_to(log_file)
        with without_hub():
            forkserver.ensure_running()
    finally:
        for which, before in handlers.items():
            signal.signal(which, before)
        for descriptor, number in zip(terminal, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


@contextmanager
def without_hub() -> Iterator[None]:
    """Processes that are started here never ask the Hugging Face Hub: the driver has fetched what they need."""
    with starting:
        before = os.environ.get(OFFLINE)
        os.environ[OFFLINE] = "1"
        try:
            yield
        finally:
            os.environ.pop(OFFLINE)
            if before is not None:
                os.environ[OFFLINE] = before


def output_to(file: Path) -> None:
    """From here on, what this process and its children print goes to the end of `file`."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with file.open("a") as target:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)


def start_workers(site: "Site") -> list[Worker]:
    resources = site.config.client_resources
    count = min((os.cpu_count() or 1) // resources.num_cpus, most_workers(site.config))
    shares = gpu_shares(resources) if resources.num_gpus else [""] * count
    return [LocalWorker(site, share) for share in shares[:count]]


class LocalWorker:
    """A worker process of this machine; `answer` starts another when it died."""

    def __init__(self, site: "Site", gpus: str) -> None:
        self.site, self.gpus, self.stopped, self.idle = site, gpus, False, True
        self.lock = threading.Lock()  # of starting and stopping
        self.start()

    def start(self) -> None:
        """Start the process, unless this worker was stopped; it loads the base model at once."""
        context: Any = multiprocessing.get_context("spawn" if self.gpus else "forkserver")
        if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
            multiprocessing.set_start_method("spawn", force=True)  # joblib's own, which the child would not know
        with self.lock:
            if self.stopped:
                return
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs, self.gpus, self.site.log_file))
            with without_hub():
                self.process.start()
            theirs.close()
            with suppress(OSError):  # dead already: `answer` meets it
                self.connection.send(self.site)

    def answer(self, message: Message, partition_id: int, timeout_s: float) -> Message:
        """The client's reply.

        Raises:
            WorkerDied: if the process ends, or has not answered after `timeout_s` seconds and is ended.
        """
        process, late, self.idle = self.process, threading.Event(), False

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout_s, give_up)
        timer.start()
        try:
            self.connection.send((message, partition_id))
            reply: Message = self.connection.recv()
            self.idle = True
            return reply
        except (EOFError, OSError) as error:
            self.end()
            reason = f"its worker process died ({describe_exit(process.exitcode)}) and was replaced"
            if late.is_set():
                reason = f"no reply in {timeout_s:.0f}s: its worker process was ended and replaced"
            self.start()
            raise WorkerDied(reason) from error
        finally:
            timer.cancel()

    def stop(self) -> None:
        """End the process: an idle one leaves by itself, a busy one is killed."""
        with self.lock:
            self.stopped = True
            if self.idle:
                with suppress(OSError):
                    self.connection.close()
                self.process.join(LEAVE_S)
        self.end()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        with suppress(OSError):  # the thread that waits for an answer may close it at the same time
            self.connection.close()


def describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{hint}"


def work(connection: Connection, gpus: str, log_file: Path | None) -> None:
    """The main function of a worker process: answer until the driver is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if log_file and log_file.parent.is_dir():
        output_to(log_file)  # what libraries print
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    threading.Thread(target=leave_with_driver, daemon=True).start()
    answer = answering(connection.recv())
    while True:
        try:
            message, partition_id = connection.recv()
        except EOFError:
            return
        connection.send(answer(message, partition_id))


def leave_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(0)


def answering(site: "Site") -> Callable[[Message, int], Message]:
    """A function that answers messages as `client.client_app` does. The base model is being loaded from here on."""
    from client import client_app, resident_worker
    from utils import log_to_file

    gc.freeze()  # every trainer collects garbage: let it not look through all that was imported
    identify_as_flower_task()
    if site.log_file and site.log_file.parent.is_dir():
        log_to_file(site.log_file)
    app = client_app(site)
    try:
        resident_worker(site).trainer  # noqa: B018
    except Exception:  # the first message meets it again, and reports it
        log.exception("the base model does not load")

    def answer(message: Message, partition_id: int) -> Message:
        node: Any = {"partition-id": partition_id}
        return app(message, Context(1, message.metadata.dst_node_id, node, RecordDict(), UserConfig()))

    return answer


# --- actors of a Ray cluster ----------------------------------------------------------------------


def start_actors(site: "Site") -> list[Worker]:
    """Workers on the Ray cluster at `ray.address`, as many as its nodes have room for."""
    import ray

    address, resources = str(site.config.ray.address), site.config.client_resources
    environment = {"env_vars": {"PYTHONPATH": str(SUITE_FOLDER)}}
    try:
        if host_port := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):  # Ray itself would try for many minutes
            socket.create_connection((host_port[1], int(host_port[2])), timeout=5).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, runtime_env=environment)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"ray.address={address}: no Ray cluster answers; start one with `ray start --head`"
        ) from error
    count = sum(room_on(node["Resources"], resources) for node in ray.nodes() if node["Alive"])
    if not count:
        ray.shutdown()
        raise SettingsError(
            f"client_resources.num_cpus={resources.num_cpus}, num_gpus={resources.num_gpus:g}: no machine of the Ray "
            "cluster has them; ask for less"
        )
    workers = [RayWorker(site) for _ in range(min(count, most_workers(site.config)))]
    try:  # downloads are no part of a round's time
        ray.get([worker.actor.ready.remote() for worker in workers])
    except ray.exceptions.RayError as error:
        ray.shutdown()
        raise RunError(f"ray.address={address}: a worker does not start ({shortened(error, 300)})") from error
    return list(workers)


def room_on(node: dict[str, float], wanted: ClientResources) -> int:
    """Workers that a node of a Ray cluster has room for."""
    room = node.get("CPU", 0.0) // wanted.num_cpus
    return int(min(room, (node.get("GPU", 0.0) + 1e-9) // wanted.num_gpus) if wanted.num_gpus else room)


class RayWorker:
    """A Ray actor that holds a client's process; Ray restarts it when it dies."""

    def __init__(self, site: "Site") -> None:
        import ray

        wanted = site.config.client_resources
        actor: Any = ray.remote(num_cpus=wanted.num_cpus, num_gpus=wanted.num_gpus, max_restarts=-1)(Answering)
        self.actor = actor.remote(site)

    def answer(self, message: Message, partition_id: int, timeout_s: float) -> Message:
        """As LocalWorker.answer."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            reply: Message = ray.get(self.actor.answer.remote(message, partition_id), timeout=max(0.0, timeout_s))
            return reply
        except GetTimeoutError as error:
            ray.kill(self.actor, no_restart=False)
            raise WorkerDied(f"no reply in {timeout_s:.0f}s: its Ray actor was ended and is replaced") from error
        except RayActorError as error:
            raise WorkerDied("its Ray actor died and is replaced") from error

    def stop(self) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(self.actor)


class Answering:
    """What a Ray actor does."""

    def __init__(self, site: "Site") -> None:
        self.answering = answering(site)

    def ready(self) -> bool:
        return True

    def answer(self, message: Message, partition_id: int) -> Message:
        return self.answering(message, partition_id)
