"""Ray under a simulation: what fits into this machine, and Ray itself, started here or joined (`ray.address`).

It starts early, while the driver still imports and checks; Ray's worker processes import the model libraries meanwhile.
Imports nothing heavy.
"""

import ctypes
import functools
import logging
import math
import os
import re
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import psutil

from machine import gpus
from runs.stopping import SIGNALS
from settings.schema import ClientResources, RunConfig, SettingsError
from utils import SUITE_FOLDER

log = logging.getLogger(__name__)

LEAVE_S, MOST_LEAVE_S = 5.0, 15.0  # when the process ends, and when another Ray is to come
RAY_COUNTS = 10_000  # parts of a GPU, rounded
UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")  # processes: autoscaler, terminal, dashboard
LONGEST_FOLDER = 40  # of Ray's: the paths of its sockets have 60 characters more, and may have 107
GPUS_BY_RAY = {  # by Ray, which may leave it to the environment
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker without a GPU sees none
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0",  # one with a GPU sees no other
}
ENVIRONMENT = GPUS_BY_RAY | {
    "RAY_worker_niceness": "0",  # workers are as important as anything else
    "RAY_memory_monitor_refresh_ms": "0",  # it would end workers when others fill the machine
}
FOR_THIS_MACHINE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # how long Ray outlives a driver that was killed


# --- the machine ----------------------------------------------------------------------------------


def here(resources: ClientResources) -> dict[str, int]:
    """What this machine has for workers, as Ray counts it."""
    return {"CPU": os.cpu_count() or 1, "GPU": len(gpus.ids()) if resources.num_gpus else 0}


def room_on(node: Mapping[str, float], wanted: ClientResources) -> int:
    """Workers that a machine has room for; one that takes a part of a GPU shares it with others of such parts."""
    room = node.get("CPU", 0.0) // wanted.num_cpus
    return int(min(room, node.get("GPU", 0.0) * sharers(wanted)) if wanted.num_gpus else room)


def sharers(wanted: ClientResources) -> int:
    """Workers that one GPU has room for."""
    return int(1 / wanted.num_gpus + 1e-9)


def spread(nodes: Iterable[Mapping[str, float]], wanted: ClientResources, count: int) -> float:
    """The largest part of a GPU, from what was asked for to all of it, with which `count` workers still fit.

    Ray fills one GPU before it uses the next: with parts as large as possible none is shared while another is idle.
    """
    if not wanted.num_gpus:
        return 0.0
    nodes = list(nodes)
    for workers in range(1, sharers(wanted)):
        part = replace(wanted, num_gpus=math.floor(RAY_COUNTS / workers) / RAY_COUNTS)
        if sum(room_on(node, part) for node in nodes) >= count:
            return part.num_gpus
    return math.floor(RAY_COUNTS / sharers(wanted)) / RAY_COUNTS


def idle_gpus(config: RunConfig) -> str | None:
    """A line for the user, if GPUs of this machine would stay idle because CPU cores run out."""
    wanted = config.client_resources
    if config.ray.address or not wanted.num_gpus:
        return None
    machine = here(wanted)
    cpus, num_gpus, room = machine["CPU"], machine["GPU"], room_on(machine, wanted)
    needed = min(num_gpus, most_workers(config))
    if room >= needed:
        return None
    return (
        f"{num_gpus - room} of {num_gpus} GPUs stay idle: {cpus} CPU cores are enough for {room} workers of "
        f"client_resources.num_cpus={wanted.num_cpus}; set client_resources.num_cpus={max(1, cpus // needed)}"
    )


def check_machine(config: RunConfig) -> None:
    """Raise SettingsError if not one worker fits into this machine; a Ray cluster is left to Ray."""
    wanted = config.client_resources
    if config.ray.address:
        return
    machine, key = here(wanted), "client_resources"
    wrong: list[tuple[str, str, str]] = []  # what was asked for, what there is, what to set
    if wanted.num_cpus > (cpus := machine["CPU"]):
        wrong.append((f"{key}.num_cpus={wanted.num_cpus}", f"{cpus} CPU cores", f"{key}.num_cpus={cpus}"))
    if wanted.num_gpus and not machine["GPU"]:
        hidden = "" if (text := gpus.given()) is None else f" that CUDA_VISIBLE_DEVICES={text} lets it see"
        how = f"{key}.num_gpus=0 (to train on the CPU)"
        wrong.append((f"{key}.num_gpus={wanted.num_gpus:g}", f"no GPU{hidden}", how))
    if wrong:
        asked, has, better = zip(*wrong, strict=True)
        raise SettingsError(f"{', '.join(asked)}: this machine has {' and '.join(has)}; set {' '.join(better)}")


def most_workers(config: RunConfig) -> int:
    """Clients that may work at the same time."""
    counts = (config.evaluations_after(number, config.num_clients) for number in (0, 1))
    return max(config.clients_per_round, *counts)


# --- Ray ------------------------------------------------------------------------------------------


class RayThread(threading.Thread):
    """Ray, started or joined by a thread that lives as long: Linux ends Ray's processes with the thread.

    Jobs of a sweep share it, one after the other; `ready` says when it is there, or why it is not.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(name="ray", daemon=True)
        self.address, self.resources = config.ray.address, config.client_resources
        room = {} if self.address else here(self.resources)
        self.gpus = gpus.ids() if room.get("GPU") else []
        self.count = min(room_on(room, self.resources), most_workers(config))
        self.ready: Future[None] = Future()
        self.closing = threading.Event()

    def run(self) -> None:
        try:
            import ray

            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: they are the driver's business
            warnings.filterwarnings("ignore", message="Tip: In future versions of Ray")  # about a part of GPUS_BY_RAY
            unused: Any = dict.fromkeys(UNUSED, lambda *_, **__: None)
            with TemporaryDirectory(prefix="flowertune-", dir=short_folder(), ignore_cleanup_errors=True) as folder:
                with signals_kept(), seeing(self.gpus), patch.multiple(ray._private.node.Node, **unused):
                    arguments = self.joining() if self.address else self.starting(folder)
                    ray.init(logging_level=logging.ERROR, log_to_driver=False, **arguments)
                self.ready.set_result(None)
                with patch.object(ray._private.worker, "print_to_stdstream", to_log):  # else it speaks to the terminal
                    self.closing.wait()
                kill = ray._private.node.Node.kill_all_processes
                with patch.object(
                    ray._private.node.Node, "kill_all_processes", lambda node, **_: kill_at_once(node, kill)
                ):
                    ray.shutdown()
        except BaseException as error:  # whoever waits must learn of it
            if self.ready.done():
                log.exception("Ray")
            else:
                self.ready.set_exception(error)

    def starting(self, folder: str) -> dict[str, Any]:
        """Arguments of `ray.init` for this machine."""
        # not with GPUs: importing that module looks for them, and Ray only says later which one is a process's
        preload = {} if self.resources.num_gpus else {"preload_python_modules": ["server.worker"]}
        room = {"num_cpus": self.count * self.resources.num_cpus, "num_gpus": len(self.gpus)}
        return room | {"include_dashboard": False, "_temp_dir": folder, "_system_config": preload}

    def joining(self) -> dict[str, Any]:
        """Arguments of `ray.init` for a cluster. Raises SettingsError if none answers: Ray would try for minutes."""
        try:
            if host_port := re.fullmatch(r"(?:ray://)?(.+):(\d+)", str(self.address)):
                socket.create_connection((host_port[1], int(host_port[2])), timeout=5).close()
        except OSError as error:
            nobody = f"ray.address={self.address}: no Ray cluster answers; start one with `ray start --head`"
            raise SettingsError(nobody) from error
        environment = {"PYTHONPATH": str(SUITE_FOLDER)} | GPUS_BY_RAY
        return {"address": self.address, "runtime_env": {"env_vars": environment}}


@contextmanager
def seeing(ids: Sequence[str]) -> Iterator[None]:
    """Ray's processes, started meanwhile, see these GPUs, whatever this process sees itself."""
    import ray
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    parameters = functools.partial(ray._private.parameter.RayParams, env_vars={gpus.VARIABLE: ",".join(ids)})
    own = "get_current_process_visible_accelerator_ids"
    with (
        patch.object(ray._private.parameter, "RayParams", parameters),
        patch.object(NvidiaGPUAcceleratorManager, own, staticmethod(lambda: list(ids))),
    ):
        yield


def kill_at_once(node: Any, kill: Callable[..., None]) -> None:
    """End at once what this process started of Ray: nothing, if it joined a cluster.

    Ray would send SIGTERM first, which is blocked in its processes (`RayThread.run`), and wait a second for each. If
    only they were killed, the raylet's children would stay: agents look for the dead GCS for seconds, and idle workers
    stay until somebody has waited for the raylet.
    """
    children: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        for raylet in node.all_processes.get("raylet", ()):
            children += psutil.Process(raylet.process.pid).children(recursive=True)
    kill(node, check_alive=False, wait=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def to_log(said: Mapping[str, Any], **_: Any) -> None:
    """What Ray has to say of its own, such as that a worker died."""
    log.info("%s", " ".join(said["lines"]))


_ray: list[RayThread] = []  # at most one in a process


def begin(config: RunConfig) -> RayThread:
    """Start or join Ray, unless an earlier job of this process did; returns at once. `end` ends it."""
    new = RayThread(config)
    for old in _ray:
        if old.is_alive() and (old.address, old.resources, old.count) == (new.address, new.resources, new.count):
            return old
    end(MOST_LEAVE_S)
    os.environ.update(ENVIRONMENT if new.address else ENVIRONMENT | FOR_THIS_MACHINE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SUITE_FOLDER), os.environ.get("PYTHONPATH")]))
    new.start()
    _ray.append(new)
    return new


def end(most_s: float = LEAVE_S) -> None:
    """End the Ray that `begin` started, in `most_s` seconds; its last processes leave within seconds."""
    while _ray:
        _ray[-1].closing.set()
        _ray.pop().join(most_s)  # it is a daemon: where Ray still starts, it ends with this process


def short_folder() -> str | None:
    """Where Ray's files can lie: the user's folder for temporary files, if its path is short enough for sockets."""
    return None if len(os.fsencode(tempfile.gettempdir())) < LONGEST_FOLDER - 20 else "/tmp"  # noqa: S108


@contextmanager
def signals_kept() -> Iterator[None]:
    """Ray replaces Python's handlers, in C; they are put back in C, as Python can do it in its main thread only.

    What sigaction(2) fills is only kept; no system's struct is larger.
    """
    libc, kept = ctypes.CDLL(None), {number: ctypes.create_string_buffer(512) for number in SIGNALS}
    for number, action in kept.items():
        libc.sigaction(int(number), None, action)
    try:
        yield
    finally:
        for number, action in kept.items():
            libc.sigaction(int(number), action, None)
