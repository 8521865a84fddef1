"""The benchmarks run, at small shapes, and count what they say they count."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import model as adapters
from benchmarks import gpu, round_time, workload
from client import Worker
from tests.federation import small
from utils import SUITE_FOLDER

WITHOUT_FLOWER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flwr", "flwr_datasets", "ray", "hydra", "omegaconf"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
"""  # in every Python process that has it as sitecustomize.py


@pytest.mark.slow
def test_gpu_benchmark_runs_where_flower_ray_and_hydra_are_absent(tmp_path):
    arguments = ["--cases", "tiny:4:2", "tiny:5:2", "tiny:4:naive", "--batch", "4", "--length", "32"]
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_FLOWER)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments, f"--output={tmp_path / 'gpu.json'}"],
        cwd=SUITE_FOLDER, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=1200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    *small, good, bad, naive = results
    assert [result["case"] for result in results] == [*gpu.PREFLIGHT, "tiny:4:2", "tiny:5:2", "tiny:4:naive"]
    assert all(result["step_s"] > 0 for result in (*small, good, naive))  # one that fails does not take the next along
    assert "error" in bad


@pytest.mark.parametrize(("shape", "expected"), [("3B", 1.67e14), ("7B", 3.31e14)])
def test_operations_of_a_step_are_the_known_ones(shape, expected):
    assert gpu.step_operations(shape, 16 * 512, 512) == pytest.approx(expected, rel=0.05)


def test_documentation_rows_are_real_and_of_all_lengths():
    rows = list(workload.documentation(500))
    lengths = sorted(len(row["output"]) for row in rows)
    assert len(rows) == 500
    assert lengths[-1] > 10 * lengths[len(lengths) // 2]
    assert {bool(row["input"]) for row in rows} == {True, False}


@pytest.mark.slow
def test_limit_and_suite_do_the_same_work():
    config = small()
    torch.manual_seed(0)
    worker = Worker(config)
    limit, suite = round_time.Limit(config, worker), round_time.Suite(worker)
    adapters.set_adapter(limit.model, suite.adapter)
    assert limit.round(0, 1) == suite.round(0, 1)
    untrained = worker.untrained
    moved = np.concatenate([(suite.adapter[name] - untrained[name]).ravel() for name in untrained])
    plain = adapters.get_adapter(limit.model)
    apart = np.concatenate([(suite.adapter[name] - plain[name]).ravel() for name in untrained])
    assert np.linalg.norm(moved) > 0
    assert np.linalg.norm(apart) < 0.1 * np.linalg.norm(moved)  # Adam makes much of rounding where gradients are small


@pytest.mark.slow
@pytest.mark.parametrize("naive_rounds", [0, 1])
def test_round_time_reports_ratios_of_pairs(naive_rounds):
    times = round_time.measure(small(), 2, {"naive": naive_rounds, "main": 0}, [])
    results = round_time.summarize(times)
    assert results["limit"]["tokens"] == results["suite"]["tokens"]
    assert results["plain"]["tokens"] == results["scored"]["tokens"]
    assert results["suite/limit"] > 0
    assert ("naive" in results) == bool(naive_rounds)
    assert bool(results["naive/suite"]) == bool(naive_rounds)
    assert "main" not in results


def test_ratios_are_by_token():
    one, two = {"seconds": 3.0, "tokens": 100, "padded": 120}, {"seconds": 2.0, "tokens": 200, "padded": 210}
    times = {name: [] for pair in round_time.RATIOS for name in pair} | {"limit": [two, two], "suite": [one, one]}
    assert round_time.summarize(times)["suite/limit"] == pytest.approx(0.03 / 0.01)


def test_model_with_a_large_vocabulary_is_one_of_the_suite(tmp_path):
    folder = workload.write_model(tmp_path / "model", "7M", 5000)
    cfg = small(f"model.name={folder}").model
    assert adapters.read_config(cfg).vocab_size == 5000
    own = adapters.read_tokenizer(small().model)
    text = "What is the plan for London?"
    assert adapters.read_tokenizer(cfg)(text)["input_ids"] == own(text)["input_ids"]
