"""One short federation from the command line, with real worker processes, and its failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.federation import call_main
from utils import read_json_lines

SUITE = Path(__file__).parent.parent
SHORT = [
    "num_rounds=3",
    "evaluate.answers=2",
    "num_clients=5",
    "strategy.fraction_fit=0.4",
    "train.training_arguments.max_steps=2",
]


def run_main(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "main.py", "experiment=quickstart", *SHORT, f"hydra.run.dir={folder}", *overrides]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=SUITE, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


@pytest.mark.slow
def test_simulation_loads_once_a_worker_tokenizes_once_a_partition_and_is_quiet(tmp_path):
    done = run_main(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert sum(line.startswith("round ") for line in lines) == 3
    assert lines[-1].startswith("results: ")
    assert len(lines) <= 9, "engine noise reached the terminal"
    assert done.stderr == ""
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["model_loads"] == summary["processes"] <= os.cpu_count()
    assert summary["tokenizations"] == summary["clients_used"]
    assert not (tmp_path / ".tokens").exists()
    assert "flwr" in (tmp_path / "main.log").read_text()


@pytest.mark.slow  # a claim about time, which a busy machine cannot keep
def test_engine_and_server_take_less_than_a_second_of_a_round(tmp_path):
    assert run_main(tmp_path).returncode == 0
    for line in read_json_lines(tmp_path / "metrics.jsonl")[1:]:
        assert line["seconds"]["transfer"] + line["seconds"]["aggregate"] < 1.0


@pytest.mark.slow
def test_clients_that_all_fail_end_the_run_with_their_traceback_and_exit_code_1(tmp_path, capsys):
    missing = "train.training_arguments.optim=apollo_adamw"  # of a package that is not there: only a client notices
    assert call_main("experiment=quickstart", *SHORT, f"hydra.run.dir={tmp_path}", missing) == 1
    said = capsys.readouterr().err
    assert "apollo_torch" in said
    assert "not one valid reply" in said
    assert not (tmp_path / "results.json").exists()
    assert "Traceback" in (tmp_path / "error.txt").read_text()
