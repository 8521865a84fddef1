"""The engine: worker processes that die, are late, or are many; none outlives the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from client import Site
from server import engine
from server.engine import WorkerDied, WorkerGrid
from settings.schema import ClientResources, SettingsError
from tests.conftest import children, small, wait_for_end
from utils import read_json_lines

SUITE = Path(__file__).parent.parent


class Scripted:
    """A worker that answers from a list: a number of seconds to take, or an exception to raise."""

    def __init__(self, script):
        self.script, self.answered, self.stopped = list(script), [], False

    def answer(self, message, partition_id, timeout_s):
        act = self.script.pop(0)
        if isinstance(act, Exception):
            raise act
        time.sleep(act)
        self.answered.append(partition_id)
        return Message(RecordDict({"who": ConfigRecord({"partition": partition_id})}), reply_to=message)

    def stop(self):
        self.stopped = True


@pytest.fixture
def questions():
    engine.identify_as_flower_task()
    return lambda nodes, ttl=60.0: [Message(RecordDict(), node, "train", ttl=ttl) for node in nodes]


def test_every_message_gets_its_own_reply_from_any_worker(questions):
    workers = [Scripted([0.05] * 20), Scripted([0.01] * 20)]
    grid = WorkerGrid(workers, 20)
    messages = questions(grid.get_node_ids())
    replies = grid.send_and_receive(messages)
    grid.close()
    asked = {message.metadata.message_id: message.metadata.dst_node_id - 1 for message in messages}
    assert {asked[r.metadata.reply_to_message_id]: r.content["who"]["partition"] for r in replies} == {
        partition: partition for partition in range(20)
    }
    assert len(workers[1].answered) > len(workers[0].answered)  # whoever is free takes the next
    assert all(worker.stopped for worker in workers)


def test_failing_worker_answers_with_an_error_and_goes_on(questions):
    grid = WorkerGrid([Scripted([WorkerDied("it died"), ValueError("odd"), 0.0])], 3)
    replies = grid.send_and_receive(questions([1, 2, 3]))
    grid.close()
    assert sorted(reply.error.reason for reply in replies if reply.has_error()) == ["it died", "odd"]
    assert sum(not reply.has_error() for reply in replies) == 1


def test_message_that_waited_too_long_is_not_handed_out_and_late_replies_are_not_kept(questions):
    worker = Scripted([0.3, 0.0])
    grid = WorkerGrid([worker], 2)
    assert grid.send_and_receive(questions([1, 2], ttl=0.2), timeout=0.5) == []
    grid.close()
    assert worker.answered == [0]
    assert grid.replies == {}


@pytest.mark.parametrize(
    ("num_gpus", "visible", "shares"),
    [
        (1.0, "", ["0", "1", "2"]),
        (0.5, "", ["0", "0", "1", "1", "2", "2"]),
        (0.3, "7", ["7", "7", "7"]),
        (2.0, "", ["0,1"]),
        (1.0, "3,5", ["3", "5"]),
    ],
)
def test_workers_share_gpus_as_asked(num_gpus, visible, shares, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert engine.gpu_shares(ClientResources(num_cpus=1, num_gpus=num_gpus)) == shares


def test_room_on_a_ray_node_counts_cores_and_gpus():
    assert engine.room_on({"CPU": 8.0, "GPU": 1.0}, ClientResources(num_cpus=2, num_gpus=0.5)) == 2
    assert engine.room_on({"CPU": 8.0}, ClientResources(num_cpus=2, num_gpus=0.0)) == 4
    assert engine.room_on({"CPU": 8.0}, ClientResources(num_cpus=2, num_gpus=1.0)) == 0


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


def test_killed_worker_is_replaced_and_no_process_outlives_the_driver(tmp_path):
    steps = "train.training_arguments.max_steps=4"  # long enough for a kill to come within a round
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
        warnings = [line for line in lines if line.startswith("warning: ")]
        assert len(warnings) == 1, lines
        assert "its worker process died (SIGKILL, as when memory runs out) and was replaced" in warnings[0]
        metrics = read_json_lines(tmp_path / "metrics.jsonl")
        assert [len(line["clients"]) for line in metrics] == [2, 1, 2]
        assert len({process for line in metrics for process in line["processes"]}) == 3
    finally:
        workers |= children(run.pid)
        run.kill()  # with no chance to clean up
        run.wait()
    wait_for_end(workers)


def test_worker_that_hangs_is_ended_and_replaced(tmp_path):
    with engine.worker_grid(Site(small(), log_file=tmp_path / "main.log")) as grid:
        worker = grid.workers[0]
        first = Message(RecordDict(), 1, "query", ttl=600)
        assert worker.answer(first, 0, 600.0).content["client"]["partition-id"] == 0
        old = worker.process.pid
        os.kill(old, signal.SIGSTOP)  # alive, and silent: more than its pipe holds would block for ever
        large = ArrayRecord({"a": Array(np.zeros(1_000_000, np.float32))})
        with pytest.raises(WorkerDied, match="no reply in 1s: its worker process was ended and replaced"):
            worker.answer(Message(RecordDict({"arrays": large}), 1, "train"), 0, 1.0)
        assert worker.process.pid != old
        assert not Path(f"/proc/{old}").exists()
        assert worker.answer(first, 0, 600.0).content["client"]["partition-id"] == 0


def test_absent_ray_cluster_is_named():
    with (
        pytest.raises(SettingsError, match=r"ray.address=127.0.0.1:1: no Ray cluster answers"),
        engine.worker_grid(Site(small("ray.address=127.0.0.1:1"))),
    ):
        pass


@pytest.mark.slow
def test_ray_cluster_gives_the_adapter_of_this_machines_processes(tmp_path):
    import json

    import ray

    short = ["num_rounds=2", "num_clients=4", "strategy.fraction_fit=0.5", "train.training_arguments.max_steps=2"]
    cluster = ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        for name, extra in {"ray": [f"ray.address={cluster.address_info['address']}"], "here": []}.items():
            run = start_run(tmp_path / name, *short, *extra)
            output, _ = run.communicate(timeout=240)
            assert run.returncode == 0, output
    finally:
        ray.shutdown()
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("ray", "here")]
    assert results[0]["adapter_sha256"] == results[1]["adapter_sha256"]
    assert results[0]["processes"] == results[0]["model_loads"] == 2
