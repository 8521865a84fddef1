"""Which GPUs a process sees, on machines with any number of them: cards are faked, Ray and the processes are not."""

import os
import subprocess
import sys

import pytest
import ray
from ray._private.thirdparty import pynvml as nvml
from transformers import LlamaConfig

import model as adapters
from client import Site
from deployment import resident, work
from exchange.faults import SETTINGS_ERROR, WORKER_DIED
from learning.memory import describe_memory, place, sizes
from learning.training import training_arguments
from machine import gpus
from machine.gpus import Card
from server import engine, plan
from server.backend import simulated_grid
from settings.compose import compose
from settings.schema import ClientResources, SettingsError
from tests.faults import breaks_once
from tests.federation import small
from tests.test_engine import ask
from utils import SUITE_FOLDER

CARDS = [
    Card(f"GPU-{letter * 8}-0000", f"Fake {letter}", 24e9, free * 1e9)
    for letter, free in zip("abcd", (24, 16, 20, 12), strict=True)
]


@pytest.fixture(autouse=True)
def no_ray_is_left():
    yield
    engine.end()


def machine(monkeypatch, count: int, visible: str | None = None, cpus: int = 16) -> None:
    """Let this process be on a machine with `count` cards, started with this CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(gpus, "cards", lambda: CARDS[:count])
    monkeypatch.setattr(gpus, "given", lambda: visible)
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        (None, ["0", "1", "2"]),
        ("", []),
        ("2,0", ["2", "0"]),
        (" 1 , 2", ["1", "2"]),
        ("1,7,0", ["1"]),
        ("0,-1,1", ["0"]),
        ("1,1", []),
        ("NoDevFiles", []),
        ("GPU-bbbb,GPU-aaaaaaaa-0000", ["GPU-bbbb", "GPU-aaaaaaaa-0000"]),
        ("GPU-dddd", []),
        ("MIG-11111111-2222,MIG-33333333-4444", ["MIG-11111111-2222", "MIG-33333333-4444"]),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_see(monkeypatch, visible, ids):
    machine(monkeypatch, 3, visible)
    assert gpus.ids() == ids
    assert gpus.first() == ([visible.split(",")[0].strip()] if visible else [] if visible == "" else ["0"])


def test_hiding_forgets_nothing(monkeypatch):
    monkeypatch.setenv(gpus.VARIABLE, "3,1")
    gpus.given.cache_clear()
    try:
        gpus.show([])
        assert (os.environ[gpus.VARIABLE], gpus.given()) == ("", "3,1")
    finally:
        gpus.given.cache_clear()


@pytest.mark.parametrize(
    ("num_gpus", "count", "part"),
    [(0.5, 2, 1.0), (0.5, 3, 0.5), (0.5, 4, 0.5), (0.25, 3, 0.5), (0.3, 6, 0.3333), (1.0, 2, 1.0), (0.0, 4, 0.0)],
)
def test_workers_spread_over_all_gpus_before_they_share_one(num_gpus, count, part):
    nodes = [{"CPU": 16.0, "GPU": 2.0}]
    found = engine.spread(nodes, ClientResources(num_cpus=1, num_gpus=num_gpus), count)
    assert found == pytest.approx(part, abs=1e-4)
    assert int(1 / found + 1e-9) * 2 >= count if found else part == 0


def test_workers_on_unequal_machines_all_find_a_place():
    """A machine with one core and four GPUs takes one worker: the other four have to share the other's only GPU."""
    nodes = [{"CPU": 1.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 1.0}]
    assert engine.spread(nodes, ClientResources(num_cpus=1, num_gpus=0.25), 5) == 0.25


def test_several_gpus_for_one_worker_are_refused_with_what_to_do():
    with pytest.raises(SettingsError, match=r"num_gpus=2: a worker trains on one GPU; set client_resources.num_gpus=1"):
        compose(["client_resources.num_gpus=2"])


def test_gpus_that_stay_idle_are_named(monkeypatch):
    config = compose(["num_clients=20", "strategy.fraction_fit=0.2"])  # 4 clients a round, 8 cores and a GPU each
    machine(monkeypatch, 4, cpus=16)
    assert engine.idle_gpus(config) == (
        "2 of 4 GPUs stay idle: 16 CPU cores are enough for 2 workers of client_resources.num_cpus=8; "
        "set client_resources.num_cpus=4"
    )
    assert engine.idle_gpus(config) in plan.Inputs("", idle_gpus=engine.idle_gpus(config)).warnings
    assert plan.fits_here(config).startswith("2 of 4 GPUs stay idle")
    machine(monkeypatch, 2, cpus=16)
    assert engine.idle_gpus(config) is None


def test_hidden_gpus_are_named_as_the_reason(monkeypatch):
    machine(monkeypatch, 2, visible="", cpus=16)
    with pytest.raises(SettingsError, match=r"no GPU that CUDA_VISIBLE_DEVICES= lets it see; set .*num_gpus=0"):
        engine.check_machine(compose())


def test_plan_tells_of_the_fullest_gpu_and_of_main_memory_without_one(monkeypatch):
    machine(monkeypatch, 3, visible="2,1")
    assert place(compose()) == ("Fake b", 24e9, 16e9)
    assert place(small()).name == "CPU, main memory"


def test_a_card_that_does_not_tell_its_memory_is_there_and_the_plan_says_so(monkeypatch):
    """As in a container with a MIG device, where NVML permits less, or where a GPU has the machine's own memory."""

    def refused(_):
        raise nvml.NVMLError(nvml.NVML_ERROR_NO_PERMISSION)

    for name, told in (("Init", None), ("Shutdown", None), ("DeviceGetCount", 1), ("DeviceGetHandleByIndex", "handle")):
        monkeypatch.setattr(nvml, f"nvml{name}", lambda *_, told=told: told)
    monkeypatch.setattr(nvml, "nvmlDeviceGetUUID", lambda _: "GPU-test")
    monkeypatch.setattr(nvml, "nvmlDeviceGetName", lambda _: "NVIDIA Test")
    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", refused)
    monkeypatch.setattr(gpus, "given", lambda: None)
    assert gpus.ids() == ["0"]
    unknown = "GB without checkpointing; how much a worker may take is not known before it starts"
    for config, where in ((compose(), "NVIDIA Test"), (compose(["ray.address=head:6379"]), "ray.address=head:6379")):
        assert describe_memory(config, sizes(LlamaConfig(), config)).endswith(f"{unknown} ({where})")


def test_tf32_is_checked_where_the_gpu_is(monkeypatch):
    """The driver sees no GPU, and would refuse what its workers can do."""
    monkeypatch.setattr(adapters, "default_device", lambda: "cpu")
    assert training_arguments(compose(["+train.training_arguments.tf32=true"]), "unused").tf32 is None


@ray.remote
class Seer:
    """An actor that tells what its process sees, and whether the model libraries were there before."""

    def __init__(self) -> None:
        self.imported = "bitsandbytes" in sys.modules

    def sees(self) -> tuple[str | None, bool]:
        return os.environ.get(gpus.VARIABLE), self.imported


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_gpus", "count", "visible", "seen", "preloaded"),
    [
        (1.0, 2, " 3, GPU-x", {"3"}, False),
        (0.5, 2, "2, 0", {"0", "2"}, False),
        (0.5, 2, "GPU-bbbb,GPU-aaaa", {"GPU-bbbb", "GPU-aaaa"}, False),
        (0.0, 1, None, {""}, True),
    ],
)
def test_ray_workers_see_their_own_gpu_before_anything_is_imported(
    monkeypatch, num_gpus, count, visible, seen, preloaded
):
    machine(monkeypatch, 4, visible, cpus=2)
    config = small(f"client_resources.num_gpus={num_gpus}", f"num_clients={2 * count}")
    gpus.show([])  # as the driver does
    engine.begin(config).ready.result()
    assert ray.cluster_resources().get("GPU", 0) == (len(gpus.ids()) if num_gpus else 0)
    nodes = [node["Resources"] for node in ray.nodes()]
    part = engine.spread(nodes, config.client_resources, count)
    actors = [Seer.options(num_cpus=1, num_gpus=part).remote() for _ in range(min(count, len(seen)))]
    told = [ray.get(actor.sees.remote(), timeout=60) for actor in actors]
    assert {sees for sees, _ in told} == seen
    assert {imported for _, imported in told} == {preloaded}


@pytest.mark.slow
def test_driver_of_a_run_sees_no_gpu_and_its_cpu_workers_neither(tmp_path):
    """From the first import on, whatever the environment says; the node's facts say where the clients train."""
    code = (
        "import os, sys, main\n"
        "looked = []\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'bitsandbytes'): looked.append(os.environ.get('CUDA_VISIBLE_DEVICES'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"sys.argv = ['main.py', 'experiment=quickstart', 'dry_run=true', 'hydra.run.dir={tmp_path}']\n"
        "code = main.main()\n"
        "print(code, looked)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SUITE_FOLDER, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0,1"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 ['', '']", done.stdout + done.stderr


# --- a node ---------------------------------------------------------------------------------------


NODE = {"partition-id": 0}


def run_with(num_gpus: float) -> str:
    return f"experiment=quickstart client_resources.num_gpus={num_gpus}"


def test_node_trains_on_its_first_gpu_or_on_none(monkeypatch):
    monkeypatch.setattr(gpus, "given", lambda: " GPU-b, GPU-a")
    monkeypatch.setattr(work, "has_looked", lambda: False)
    for num_gpus, seen in ((1.0, "GPU-b"), (0.0, ""), (0.5, "GPU-b")):
        assert work.sees_its_gpus(run_with(num_gpus), NODE)
        assert os.environ[gpus.VARIABLE] == seen
    monkeypatch.undo()
    monkeypatch.setattr(gpus, "given", lambda: " GPU-b, GPU-a")
    assert work.has_looked()
    assert work.sees_its_gpus(run_with(1.0), NODE)
    assert not work.sees_its_gpus(run_with(0.0), NODE)
    assert work.sees_its_gpus("num_rouns=1", NODE)  # what is not accepted needs none


WATCHED = """
import os, sys
looked = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "bitsandbytes"): looked.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
sys.meta_path.insert(0, Watch())
import deployment.node, deployment.link, deployment.launchers
node_looked = list(looked)
import json
from deployment import resident, work
from machine import gpus
connection = resident.Connection(int(sys.argv[-1]))
answers = work.answered
def answered(name, overrides, node, content):
    answer = answers(name, overrides, node, content)
    return resident.Answer([os.getpid(), node_looked, looked, answer.code, answer.told])
work.answered = answered
work.serve(connection)
"""


@pytest.mark.slow
def test_workers_libraries_are_imported_when_it_is_known_what_they_may_see_and_it_is_replaced_for_another(monkeypatch):
    monkeypatch.setattr(resident.ResidentWorker, "command", (sys.executable, "-c", WATCHED))
    with resident.ResidentWorker(os.environ | {gpus.VARIABLE: "7,3"}) as worker:
        told = [
            worker.ask(("describe", overrides, NODE, None), 300, lambda: False).content
            for overrides in ("num_rouns=1", run_with(0), run_with(0), run_with(1))
        ]
    refused, first, second, other = told
    assert refused[1:4] == [[], [], SETTINGS_ERROR]  # nor does the node's own code import them
    assert first[0] == second[0] == refused[0] != other[0]
    assert set(first[2]) == {""}
    assert set(other[2]) == {"7"}
    assert first[3] == 0, first


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_worker_whose_gpu_failed_is_replaced_and_its_client_named(tmp_path, monkeypatch):
    breaks_once(monkeypatch, tmp_path, "cpu")
    with simulated_grid(Site(small("num_clients=2", f"client_resources.num_cpus={os.cpu_count()}"))) as grid:
        nodes = list(grid.get_node_ids())
        (reply,) = ask(grid, nodes[:1]).values()
        assert reply.error.reason.startswith("its GPU failed (device-side assert triggered), and its worker")
        assert not any(reply.has_error() for reply in ask(grid, nodes).values())


BROKEN = """
import os, sys
from deployment import resident, work
from exchange.faults import failure_of
from settings.schema import WorkerError
def answered(name, *_):
    if name == "describe":
        return resident.Answer(os.getpid())
    try:
        raise WorkerError("its GPU failed (an assert at Ann's row)")
    except WorkerError as error:
        return resident.Answer(None, *failure_of(error, []))
work.answered = answered
work.serve(resident.Connection(int(sys.argv[-1])))
"""


def test_broken_worker_of_a_node_answers_and_is_replaced(monkeypatch):
    monkeypatch.setattr(resident.ResidentWorker, "command", (sys.executable, "-c", BROKEN))
    with resident.ResidentWorker(os.environ) as worker:
        before, broken, after = (
            worker.ask((name, "", NODE, None), 60, lambda: False) for name in ("describe", "train", "describe")
        )
    assert before.content != after.content
    assert broken.code == WORKER_DIED
    assert broken.told.startswith("its GPU failed, and its worker process was replaced: ")
    assert "Ann" in broken.whole
    assert "Ann" not in broken.told
