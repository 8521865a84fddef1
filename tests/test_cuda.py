"""What only a machine with a CUDA GPU can show: `python -m pytest -m gpu -n 0 tests/test_cuda.py`."""

import gc
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from transformers import LlamaConfig

import client
import model as adapters
from benchmarks import gpu
from client import Site, Worker, fine_tune
from deployment import resident
from exchange.folding import unfolded
from learning.evaluation import score
from learning.memory import memory_bytes, sizes
from learning.training import Task
from machine import gpus
from server.backend import simulated_grid
from settings.schema import EvaluateConfig, RunError
from tests.faults import breaks_once
from tests.federation import LocalGrid, children, make_federation, run_locally, small
from tests.test_engine import ask
from utils import SUITE_FOLDER, read_json_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
ON_GPU = "client_resources.num_gpus=1"
SHORT = [
    "experiment=quickstart", "num_rounds=2", "num_clients=5", "strategy.fraction_fit=0.4", "evaluate.answers=4",
    "train.training_arguments.max_steps=4", "client_resources.num_cpus=1",
]  # fmt: skip
PRECISIONS = ["none", "8", "4"]


def free() -> None:
    """Give back what earlier tests held on the GPU."""
    client._resident.clear()
    gc.collect()
    torch.cuda.empty_cache()


def worker_of(*overrides: str) -> Worker:
    free()
    return Worker(small(ON_GPU, *overrides))


def a_round(worker: Worker, adapter=None, number: int = 1) -> tuple[dict, dict]:
    return fine_tune(worker, adapter or worker.initial, 0, Task(round_number=number, learning_rate=1e-3))


def flat(adapter) -> np.ndarray:
    return np.concatenate([adapter[name].ravel() for name in sorted(adapter)])


# --- who sees a GPU -------------------------------------------------------------------------------


def holders() -> dict[int, int]:
    """Ids of the processes that have a CUDA context, and the bytes of GPU memory that each holds."""
    from ray._private.thirdparty import pynvml as nvml

    nvml.nvmlInit()
    try:
        found = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(0))
        return {process.pid: process.usedGpuMemory or 0 for process in found}
    finally:
        nvml.nvmlShutdown()


def run_watched(folder: Path, *overrides: str) -> tuple[str, set[int], set[int], set[int]]:
    """Run main.py; returns its output, and the ids of its processes, of its workers, and of those that held a GPU."""
    command = [sys.executable, "main.py", *SHORT, f"hydra.run.dir={folder}", *overrides]
    run = subprocess.Popen(
        command, cwd=SUITE_FOLDER, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(run.stdout.read()))
    reader.start()
    every, workers, held = {run.pid}, set(), set()
    while run.poll() is None:
        every |= children(run.pid)
        workers |= children(run.pid, "ClientAppActor")
        held |= holders().keys() & every
        time.sleep(0.05)
    reader.join()
    assert run.returncode == 0, said[0] + (folder / "main.log").read_text()[-4000:]
    return said[0], every, workers, held


def test_run_without_gpus_touches_none_and_one_with_them_only_in_its_workers(tmp_path, record_property):
    torch.zeros(1, device="cuda")
    if os.getpid() not in holders():
        pytest.skip("NVML does not tell here which processes use a GPU")
    _, every, workers, held = run_watched(tmp_path / "cpu", "client_resources.num_gpus=0")
    assert workers
    assert not held
    output, every, workers, held = run_watched(tmp_path / "gpu", "client_resources.num_gpus=0.5")
    assert held == workers
    assert len(workers) == 2
    for name in ("cpu", "gpu"):
        lines = len((tmp_path / name / "main.log").read_text().splitlines())
        record_property(f"log_lines_{name}", lines)
        assert lines < 200
    peaks = [line["peak_memory_bytes"] for line in read_json_lines(tmp_path / "gpu" / "metrics.jsonl")]
    record_property("peak_memory_bytes", max(peaks))
    assert "error" not in output


def test_plan_names_the_card_and_its_free_memory(tmp_path):
    command = [sys.executable, "main.py", *SHORT, ON_GPU, "dry_run=true", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=SUITE_FOLDER, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("memory of a step")]
    assert torch.cuda.get_device_name() in line


def test_device_is_what_the_settings_say_even_where_this_process_sees_a_gpu():
    for num_gpus, device in ((0, "cpu"), (1, "cuda")):
        worker = worker_of(f"client_resources.num_gpus={num_gpus}")
        assert {parameter.device.type for parameter in worker.model.parameters()} == {device}
        assert worker.trainer.args.device.type == device
        _, report = a_round(worker)
        assert np.isfinite(report["train_loss"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_process_that_sees_two_gpus_trains_on_one():
    worker = worker_of()
    assert worker.trainer.args.n_gpu == 1
    assert np.isfinite(a_round(worker)[1]["train_loss"])
    assert torch.cuda.max_memory_allocated(1) == 0


# --- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", PRECISIONS)
def test_base_model_is_bit_identical_after_training_and_evaluation(bits):
    worker = worker_of(f"model.quantization={bits}", "dataset.holdout=0.1")
    trained = {name for name, value in worker.model.named_parameters() if value.requires_grad}
    before = {name: value.clone() for name, value in worker.model.state_dict().items() if name not in trained}
    adapter, _ = a_round(worker)
    client.evaluate_adapter(worker, adapter, 0)
    a_round(worker, adapter, 2)
    after = worker.model.state_dict()
    assert len(before) > 10
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not np.array_equal(flat(adapter), flat(worker.initial))


@pytest.mark.parametrize("bits", PRECISIONS)
def test_held_out_loss_is_the_same_before_and_after_a_process_first_trains(bits):
    worker = worker_of(f"model.quantization={bits}", "dataset.holdout=0.2")
    data = worker.held_out(0)
    adapters.set_adapter(worker.model, worker.initial)
    before = score(worker.model, worker.tokenizer, data, worker.config.train.tokens_at_once)
    a_round(worker)
    adapters.set_adapter(worker.model, worker.initial)
    after = score(worker.model, worker.tokenizer, data, worker.config.train.tokens_at_once)
    assert {name: row.tolist() for name, row in before.items()} == {name: row.tolist() for name, row in after.items()}


def gradients(worker: Worker) -> np.ndarray:
    """Of the adapter, as one vector, for the first rows of client 0 with an adapter that does something."""
    generator = np.random.default_rng(0)
    adapter = {
        name: generator.normal(0, 0.02, value.shape).astype(np.float32) for name, value in worker.initial.items()
    }
    adapters.set_adapter(worker.model, adapter)
    rows, device, found = [worker.partition(0).row(index) for index in range(8)], worker.model.device, []
    worker.model.train()
    for row in rows:
        ids, labels = (torch.tensor([row[key]], device=device) for key in ("input_ids", "labels"))
        with torch.autocast(device.type, torch.bfloat16):
            logits = worker.model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:]).backward()
    for _, parameter in sorted(worker.model.named_parameters(), key=lambda named: named[0]):
        if parameter.requires_grad:
            found.append(parameter.grad.float().flatten().cpu().numpy())
            parameter.grad = None
    return np.concatenate(found)


@pytest.mark.parametrize(("bits", "least"), [("8", 0.98), ("4", 0.7)])
def test_gradients_through_a_quantized_base_point_where_unquantized_ones_do(bits, least, record_property):
    exact, quantized = gradients(worker_of()), gradients(worker_of(f"model.quantization={bits}"))
    cosine = float(exact @ quantized / np.linalg.norm(exact) / np.linalg.norm(quantized))
    record_property(f"cosine_{bits}bit", cosine)
    assert cosine > least


@pytest.mark.parametrize("bits", ["8", "4"])
def test_cached_quantized_model_computes_the_same_bits(bits, tmp_path):
    found = []
    for _ in range(2):  # the first fills the cache
        worker = worker_of(f"model.quantization={bits}", f"model.cache_folder={tmp_path}")
        ids = torch.arange(5, 25, device=worker.model.device)[None]
        with torch.no_grad():
            found.append(worker.model.eval()(input_ids=ids).logits.cpu())
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(*found)


def test_run_started_on_a_gpu_is_resumed_on_another_device_with_the_same_state(tmp_path, record_property):
    """On the CPU here: what was written does not depend on where."""
    four = ["num_rounds=4", "train.save_every_round=1"]
    config, other = small(ON_GPU, *four), small("client_resources.num_gpus=0", *four)
    _, summary = run_locally(config, tmp_path / "whole")
    app = client.client_app(Site(config))

    def until_round_3(message: Message, context: Context) -> Message:
        if "config" in message.content and message.content["config"]["server-round"] == 3:
            raise KeyboardInterrupt
        return app(message=message, context=context)

    with pytest.raises(KeyboardInterrupt):
        run_locally(config, tmp_path / "torn", until_round_3)
    federation = make_federation(other, tmp_path / "torn")
    federation.restore()
    at_round_2 = adapters.load_adapter(tmp_path / "whole" / "peft_2")
    assert np.allclose(flat(federation.record.state.adapter), flat(at_round_2), atol=1e-4)
    client._resident.clear()
    resumed = federation.run(LocalGrid(client.client_app(Site(other)), other.num_clients))
    record_property("final_losses", [summary["final_train_loss"], resumed["final_train_loss"]])
    assert resumed["final_train_loss"] == pytest.approx(summary["final_train_loss"], rel=0.05)


def test_training_builds_no_kernel_that_needs_a_compiler(tmp_path):
    """With an empty folder for Triton's kernels: it stays empty, so no compiler was asked for."""
    code = (
        "from tests.test_cuda import a_round, worker_of\n"
        "for bits in ('none', '8', '4'): a_round(worker_of(f'model.quantization={bits}'))\n"
    )
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SUITE_FOLDER, env=environment, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("bits", ["4", "8"])
def test_memory_of_a_step_of_a_3b_is_as_estimated(bits, record_property):
    free()
    case = gpu.Case(f"3B:{bits}:4", batch=16, length=512, rate=1.0)
    config = gpu.settings(case)
    config.transfer, config.evaluate = "fp32", EvaluateConfig(every_rounds=1, answers=0, max_new_tokens=1)
    shape = LlamaConfig(**gpu.SHAPES["3B"], tie_word_embeddings=False)
    estimate, allocated = memory_bytes(sizes(shape, config), config), 1e9 * gpu.run_suite(case)["allocated_gb"]
    record_property("estimated_and_allocated", [estimate, allocated])
    assert allocated == pytest.approx(estimate, rel=0.15)


# --- faults ---------------------------------------------------------------------------------------


def test_out_of_memory_in_the_allocator_is_named_with_what_helps(tmp_path):
    free()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        with pytest.raises(RunError, match="out of GPU memory .*it helps: ") as raised:
            run_locally(small(ON_GPU, "strategy.round_retries=0"), tmp_path)
        assert "train.micro_batch_size" in str(raised.value)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        client._resident.clear()


def test_worker_that_met_an_assert_on_its_gpu_is_replaced(tmp_path, monkeypatch):
    breaks_once(monkeypatch, tmp_path, "cuda")
    config = small(ON_GPU, "num_clients=2", "strategy.fraction_fit=0.5")
    with simulated_grid(Site(config, log_file=tmp_path / "main.log")) as grid:
        nodes = list(grid.get_node_ids())
        (reply,) = ask(grid, nodes[:1]).values()
        assert reply.error.reason.startswith("its GPU failed ("), reply.error.reason
        good = ask(grid, nodes)
        assert not any(reply.has_error() for reply in good.values())
        assert {reply.content["client"]["device"] for reply in good.values()} == {torch.cuda.get_device_name()}


# --- a node ---------------------------------------------------------------------------------------


@pytest.fixture
def node_worker():
    """A node's resident worker; this process is the node's own."""
    with resident.ResidentWorker(os.environ) as worker:
        yield worker


def answer_of(worker: resident.ResidentWorker, name: str, overrides: str) -> resident.Answer:
    return worker.ask((name, overrides, {"partition-id": 0, "resident": True}, RecordDict()), 300, lambda: False)


def test_node_serves_runs_on_its_gpu_and_on_its_cpu_one_after_the_other(node_worker):
    for num_gpus, device in ((1, torch.cuda.get_device_name()), (0, "CPU x86_64"), (1, torch.cuda.get_device_name())):
        overrides = f"experiment=quickstart client_resources.num_gpus={num_gpus}"
        described = answer_of(node_worker, "describe", overrides)
        assert described.content["client"]["device"] == device, described.whole
        made = answer_of(node_worker, "initial", f"{overrides} model.quantization=4")
        assert unfolded(made.content)["arrays"], made.whole
        assert (node_worker.process.pid in holders()) == bool(num_gpus)
    assert node_worker.process.poll() is None


def test_node_whose_gpu_is_full_says_what_helps(node_worker):
    free()
    left, _ = torch.cuda.mem_get_info()
    overrides = "experiment=quickstart client_resources.num_gpus=1"
    filler = torch.empty(left - 64_000_000, dtype=torch.uint8, device="cuda")  # no room for a context of 200 MB or more
    try:
        assert re.match(r"out of GPU memory .*it helps: ", answer_of(node_worker, "initial", overrides).told)
    finally:
        del filler
        torch.cuda.empty_cache()


def test_sound_cards_are_found_without_cuda():
    (card, *_) = gpus.cards()
    assert card.uuid.startswith("GPU-")
    assert card.name == torch.cuda.get_device_name()
    assert 0 < card.free_bytes <= torch.cuda.mem_get_info()[1]
