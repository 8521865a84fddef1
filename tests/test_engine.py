"""The engine: worker processes that die, are late, or are many; none outlives the run."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from client import Site
from exchange import clients
from server import backend, engine
from server.backend import ResidentBackend, simulated_grid
from settings.schema import ClientResources, SettingsError
from tests.federation import Silent, children, small, wait_for_end
from utils import read_json_lines

SUITE = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def no_ray_is_left():
    yield
    engine.end()


@pytest.mark.parametrize(("num_gpus", "room"), [(1.0, 3), (0.5, 6), (0.3, 9), (0.0, 16)])
def test_room_counts_cores_and_gpus(num_gpus, room):
    assert engine.room_on({"CPU": 16.0, "GPU": 3.0}, ClientResources(num_cpus=1, num_gpus=num_gpus)) == room
    assert engine.room_on({"CPU": 2.0, "GPU": 3.0}, ClientResources(num_cpus=1, num_gpus=num_gpus)) == min(room, 2)
    assert engine.room_on({"CPU": 16.0}, ClientResources(num_cpus=4, num_gpus=num_gpus)) == (0 if num_gpus else 4)


def test_files_of_ray_lie_where_their_sockets_have_short_paths(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 90)
    assert engine.short_folder() == "/tmp"
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert engine.short_folder() is None


def start_run(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "main.py",
        "experiment=quickstart",
        "dataset.eval_name=null",
        f"hydra.run.dir={folder}",
        *overrides,
    ]
    return subprocess.Popen(
        command, cwd=SUITE, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_worker_is_replaced_and_no_process_outlives_the_driver(tmp_path):
    steps = "train.training_arguments.max_steps=4"  # long enough for a kill to come within a round
    workers: set[int] = set()
    run = start_run(tmp_path, "num_rounds=40", "num_clients=4", "strategy.fraction_fit=0.5", steps)
    try:
        lines = []
        for line in run.stdout:
            lines.append(line)
            if line.startswith("round 1/"):
                workers = children(run.pid)
                victim = int(read_json_lines(tmp_path / "metrics.jsonl")[0]["processes"][0].split(":")[1])
                os.kill(victim, signal.SIGKILL)
            if line.startswith("round 3/"):
                break
        warnings = [line for line in lines if not line.startswith(("round ", "waiting ", "read as "))]
        assert len(warnings) == 1, lines
        assert "its worker process died, as when memory runs out, and was replaced" in warnings[0]
        metrics = read_json_lines(tmp_path / "metrics.jsonl")
        assert [len(line["clients"]) for line in metrics] == [2, 1, 2]
        assert len({process for line in metrics for process in line["processes"]}) == 3
    finally:
        workers |= children(run.pid)
        run.kill()  # with no chance to clean up
        run.wait()
    wait_for_end(workers, 10)


def ask(grid, nodes, **content) -> dict[int, Message]:
    """What the clients on `nodes` reply to the question who they are, by node."""
    messages = [Message(RecordDict(content), node, "query", ttl=1e9) for node in nodes]
    sent = dict(zip(grid.push_messages(messages), nodes, strict=True))
    replies: dict[int, Message] = {}
    while sent:
        time.sleep(0.05)
        for reply in grid.pull_messages(sent):
            replies[sent.pop(reply.metadata.reply_to_message_id)] = reply
    return replies


def test_every_client_answers_for_itself_from_as_many_workers_as_are_needed(tmp_path, monkeypatch):
    before = children(os.getpid(), "ClientAppActor")
    with simulated_grid(Site(small("num_clients=5"), log_file=tmp_path / "main.log")) as grid:
        monkeypatch.setattr(clients, "SIMULATED_ASKED", 0)
        known = clients.Clients(grid, 60.0, Silent()).nodes
        replies = ask(grid, list(grid.get_node_ids()))
        assert {reply.content["client"]["partition-id"]: node for node, reply in replies.items()} == known
        assert list(known) == [0, 1, 2, 3, 4]
        assert len(workers := children(os.getpid(), "ClientAppActor") - before) == min(os.cpu_count(), 2)
        assert (tmp_path / "main.log").exists()
    wait_for_end(workers, 10)


@pytest.mark.slow
def test_worker_that_hangs_is_ended_and_replaced(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(backend, "ResidentBackend", lambda site: made.append(ResidentBackend(site)) or made[0])
    config = small("num_clients=2", f"client_resources.num_cpus={os.cpu_count()}")
    with simulated_grid(Site(config, log_file=tmp_path / "main.log")) as grid:
        nodes = list(grid.get_node_ids())
        ask(grid, nodes)
        (old,) = children(os.getpid(), "ClientAppActor")
        os.kill(old, signal.SIGSTOP)  # alive, and silent
        made[0].timeout_s = 3.0
        large = ArrayRecord({"a": Array(np.zeros(1_000_000, np.float32))})
        assert {reply.error.reason for reply in ask(grid, nodes, arrays=large).values()} == {
            "no reply in 3s: its worker process was ended and replaced",
            "no worker was free in time",
        }
        wait_for_end([old], 15)  # Ray asks it first, for 5 s
        made[0].timeout_s = 600.0
        assert [reply.has_error() for reply in ask(grid, nodes).values()] == [False, False]


def test_end_of_ray_leaves_no_process_behind_and_touches_no_cluster():
    with subprocess.Popen(["sh", "-c", "sleep 600 & echo; wait"], stdout=subprocess.PIPE) as raylet:
        raylet.stdout.readline()
        assert len(below := children(raylet.pid)) == 1
        options = []
        node = SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=raylet)]})
        engine.kill_at_once(node, lambda _, **given: options.append(given) or raylet.kill() or raylet.wait())
        wait_for_end([raylet.pid, *below], 10)
    engine.kill_at_once(SimpleNamespace(all_processes={}), lambda _, **given: options.append(given))
    assert options == [{"check_alive": False, "wait": True}] * 2


def test_absent_ray_cluster_is_named():
    with (
        pytest.raises(SettingsError, match=r"ray.address=127.0.0.1:1: no Ray cluster answers"),
        simulated_grid(Site(small("ray.address=127.0.0.1:1"))),
    ):
        pass


@pytest.mark.slow
def test_ray_cluster_of_two_machines_gives_the_adapter_of_this_machines_processes(tmp_path):
    import json

    from ray.cluster_utils import Cluster

    short = ["num_rounds=2", "num_clients=4", "strategy.fraction_fit=0.5", "train.training_arguments.max_steps=2"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)  # each has room for one of the two workers
        for name, extra in {"ray": [f"ray.address={cluster.address}"], "here": []}.items():
            run = start_run(tmp_path / name, *short, *extra)
            output, _ = run.communicate(timeout=240)
            assert run.returncode == 0, output
    finally:
        cluster.shutdown()
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("ray", "here")]
    assert results[0]["adapter_sha256"] == results[1]["adapter_sha256"]
    assert results[0]["processes"] == results[0]["model_loads"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("module", ["server.worker", "server.backend", "deployment.work", "test"])
def test_processes_start_without_a_compiler_that_they_do_not_use(module):
    code = f"import sys, {module}; print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=SUITE, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
