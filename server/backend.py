"""One simulated run on Flower's Ray backend, with what this suite promises of workers: one that dies or is late is
replaced at once, its message is answered with an error, and none outlives the run.
"""

import dataclasses
import functools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import Queue
from typing import Any
from unittest.mock import patch

import ray
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.simulation.ray_transport.ray_actor import ClientAppActor
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

import model
from client import Site, client_app
from exchange.faults import WORKER_DIED
from runs import runfolder, stopping
from server import engine, plan
from server.play import play
from server.worker import set_up
from settings.schema import RunConfig, RunError, SettingsError
from utils import local_path, objective, quiet_libraries, shortened

log = logging.getLogger(__name__)

POLL_S = 0.01  # between two looks for new messages
TOKEN_CACHE = ".tokens"


def simulate(config: RunConfig, folder: Path, overrides: Sequence[str] = ()) -> float:
    """Check that the run can work, run or resume it; returns what a sweeper minimises.

    Raises SettingsError before the first round, if it cannot work, and RunError if a round fails.
    """
    quiet_libraries()
    plan.check_names(config)
    with runfolder.claimed(folder, config, overrides) as resumes, token_cache(folder) as cache:
        checked = None if local_path(config.model.name) else plan.check_inputs(config)  # before weights are downloaded
        model.base_folder(config.model, weights=not config.ray.address)  # a cluster's machines download it themselves
        with simulated_grid(Site(config, False, cache, folder / "main.log")) as grid:
            inputs = checked or plan.check_inputs(config)  # while the workers load the base model
            runfolder.check_data(folder, inputs.data)
            return objective(play(grid, config, folder, inputs, resumes=resumes))


@contextmanager
def token_cache(folder: Path) -> Iterator[Path]:
    """A folder in which the workers share tokenized partitions, new and for this run only."""
    cache = folder / TOKEN_CACHE
    shutil.rmtree(cache, ignore_errors=True)  # of a process that was killed
    try:
        yield cache
    finally:
        shutil.rmtree(cache, ignore_errors=True)


class ResidentBackend(raybackend.RayBackend):
    """Answers messages with resident Ray actors, each within `strategy.round_timeout_s` from when it was sent.

    Ray could restart actors and try their messages again by itself (`max_restarts`, `max_task_retries`), but then a
    message that hangs or kills its worker would do so twice.
    """

    def __init__(self, site: Site) -> None:
        self.config, self.timeout_s = site.config, site.config.sampling.round_timeout_s
        super().__init__({"client_resources": dataclasses.asdict(site.config.client_resources)})
        self.actor_kwargs = {"on_actor_init_fn": functools.partial(set_up, site)}
        self.idle: list[Any] = []
        self.all: set[Any] = set()
        self.deadlines: dict[str, float] = {}  # by message id, on the monotonic clock
        self.built, self.closing, self.lock = threading.Event(), False, threading.Lock()

    def init_ray(self, backend_config: Any) -> None:
        """Ray is there already (`engine.begin`), and stays for the next job of a sweep."""

    @property
    def num_workers(self) -> int:
        """Messages that can be answered at the same time."""
        return len(self.all)

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        """Start the workers. Raises SettingsError if no machine of a cluster has room for one."""
        self.app_fn, wanted = app_fn, self.config.client_resources
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(engine.room_on(node, wanted) for node in nodes)
        if not room:
            asked = f"client_resources.num_cpus={wanted.num_cpus}, num_gpus={wanted.num_gpus:g}"
            raise SettingsError(f"{asked}: no machine of the Ray cluster has them; ask for less")
        count = min(room, engine.most_workers(self.config))
        self.client_resources["num_gpus"] = engine.spread(nodes, wanted, count)
        for _ in range(count):
            self.add_worker()
        self.built.set()

    def add_worker(self) -> None:
        with self.lock:
            if not self.closing:
                actor: Any = ClientAppActor.options(**self.client_resources).remote(**self.actor_kwargs)  # type: ignore[attr-defined]
                self.idle.append(actor)
                self.all.add(actor)

    def take_messages(self, state: Any, messages: Queue[Message], nodes: Any, stopped: threading.Event) -> None:
        """Queue new messages. Flower's own function asks every node ten times a second whether it has one."""
        while not stopped.wait(POLL_S):
            with state.lock:
                new = [message for message in state.message_ins_store.values() if not message.metadata.delivered_at]
            for message in new:
                message.metadata.delivered_at = datetime.now(UTC).isoformat()
                self.deadlines[message.metadata.message_id] = time.monotonic() + self.timeout_s
                messages.put(message)

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        """The client's reply, or an error in its name if its worker died or is late."""
        left_s = self.deadlines.pop(message.metadata.message_id) - time.monotonic()
        if left_s <= 0:
            return failed(message, "no worker was free in time"), context
        actor, partition = self.idle.pop(), str(context.node_config["partition-id"])
        try:
            _, reply, after = ray.get(actor.run.remote(self.app_fn, message, partition, context), timeout=left_s)
        except RayTaskError:  # of the client: its worker is well
            self.idle.append(actor)
            raise
        except GetTimeoutError:
            reason = f"no reply in {self.timeout_s:g}s: its worker process was ended and replaced"
        except RayError:
            reason = "its worker process died, as when memory runs out, and was replaced"
        else:
            if not (reply.has_error() and reply.error.code == WORKER_DIED):
                self.idle.append(actor)
                return reply, after
            reason = reply.error.reason
        if not self.closing:
            log.error("client %s: %s", partition, reason)
        self.end_worker(actor)
        self.add_worker()
        return failed(message, reason), context

    def end_worker(self, actor: Any) -> None:
        self.all.discard(actor)
        with suppress(Exception):  # Ray may be gone
            ray.kill(actor)

    def terminate(self) -> None:
        """End all workers, whatever they are doing."""
        with self.lock:
            self.closing = True
        self.built.set()
        for actor in list(self.all):
            self.end_worker(actor)


def failed(message: Message, reason: str) -> Message:
    return Message(Error(WORKER_DIED, reason), reply_to=message)


@contextmanager
def simulated_grid(site: Site) -> Iterator[Grid]:
    """The Grid of a simulation, whose nodes are answered by as many workers as fit, and are needed at the same time.

    Flower's engine runs in a thread; its ServerApp hands the Grid over to this one and waits, so that signals,
    exceptions and exit codes stay here. No worker is left afterwards; Ray itself is, until `engine.end`.

    Raises SettingsError if `ray.address` is not a cluster's, and RunError if Ray or Flower's engine does not start.
    """
    config, ready = site.config, engine.begin(site.config).ready
    backend, started, finished = ResidentBackend(site), Future[Grid](), threading.Event()
    app = ServerApp()

    @app.main()
    def hand_over(grid: Grid, _: Context) -> None:
        backend.built.wait()
        if not backend.closing:
            started.set_result(grid)
        finished.wait()

    def run_engine() -> None:
        try:
            while not ready.done() and not backend.closing:
                time.sleep(POLL_S)
            if backend.closing:
                return
            ready.result()
            with (
                patch.object(raybackend, "RayBackend", lambda _: backend),
                patch.object(vce_api, "add_messages_to_queue", backend.take_messages),
                patch.object(vce_api, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(backend.num_workers or 1)),
            ):
                run_simulation(app, client_app(site), config.num_clients)
        except BaseException as error:
            if started.done():
                log.exception("Flower's engine")
            else:
                started.set_exception(error)

    thread = threading.Thread(target=run_engine, name="flower", daemon=True)
    try:
        thread.start()
        yield received(started, config)
    finally:
        with stopping.held():
            finished.set()
            backend.terminate()
            if thread.ident:
                thread.join()


def received(started: Future[Grid], config: RunConfig) -> Grid:
    """The Grid, or in one line why there is none."""
    try:
        return started.result()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ and not isinstance(cause, SettingsError):  # Flower wraps it twice
            cause = cause.__cause__
        if isinstance(cause, SettingsError):
            raise cause from error
        where = f"ray.address={config.ray.address}: " if config.ray.address else ""
        raise RunError(f"{where}the engine does not start ({shortened(cause, 300)})") from error
