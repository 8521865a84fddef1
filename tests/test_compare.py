"""Sweeps, and the table and picture of any run folders."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runs import compare, reading
from settings.resume import resumed_sweep
from settings.schema import SettingsError
from tests.federation import call_main, children, wait_for_end
from utils import append_json_line, read_json_lines, write_json

SUITE = Path(__file__).parent.parent
TINY = [
    "experiment=quickstart", "dataset.eval_name=null", "num_clients=2", "num_rounds=1", "strategy.fraction_fit=0.5",
    "train.training_arguments.max_steps=1", "train.training_arguments.per_device_train_batch_size=2",
    "train.micro_batch_size=2",
]  # fmt: skip


def make_run(folder: Path, losses, overrides=(), error="", complete=True) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(list(overrides)))
    for number, loss in enumerate(losses, start=1):
        line = {"round": number, "train_loss": loss, "bytes_up": 10, "bytes_down": 20, "peak_memory_bytes": number}
        append_json_line(folder / "metrics.jsonl", line | {"seconds": {"wall": 2.0}})
    if complete:
        facts = {"final_train_loss": losses[-1], "best_train_loss": min(losses), "rounds": len(losses)}
        write_json(folder / "results.json", facts | {"bytes_up": 30, "bytes_down": 60, "seconds": 7.5})
    if error:
        (folder / "error.txt").write_text(error)
    return folder


@pytest.fixture
def folders(tmp_path):
    sweep = tmp_path / "sweep"
    make_run(sweep / "0", [2.0, 1.0, 1.5], ["model.quantization=4", "num_rounds=3", "seed=1"])
    make_run(sweep / "2", [3.0], ["model.quantization=8", "num_rounds=3", "seed=1"], complete=False)
    make_run(sweep / "10", [], ["model.quantization=8", "num_rounds=3", "+seed=2"], "no such | file\nat all", False)
    return sweep


def test_broken_folders_get_a_row_and_hide_no_other(folders, tmp_path):
    for name, file, content in (
        ("3", "results.json", b""),
        ("4", "metrics.jsonl", b'{"round": 1, "train_loss": 2.5}\n{"round": 2, "tra'),
        ("5", ".hydra/overrides.yaml", b"[: {"),
        ("6", "error.txt", b"\xff broken"),
        ("7", "settings.json", b"[]"),
        (
            "9",
            "metrics.jsonl",
            b'[]\n{"round": 1, "train_loss": 2.5, "held_out": 3}\n{"round": 1, "train_loss": null}\n',
        ),
    ):
        (folders / name / ".hydra").mkdir(parents=True)
        (folders / name / file).write_bytes(content)
    make_run(folders / "8", [float("nan")], [r"model.name='$\\frac{1$ |\n'"])
    runs = reading.find_runs([folders])
    compare.report(runs, tmp_path)
    rows = {row["run"]: row for row in read_table(tmp_path)}
    assert list(rows) == ["0", "2", "3", "4", "5", "6", "7", "8", "9", "10"]
    assert (rows["4"]["final loss"], rows["4"]["rounds"]) == ("2.5", "1")
    assert (rows["9"]["final loss"], rows["9"]["status"]) == ("", "interrupted")
    assert (rows["8"]["final loss"], rows["8"]["best loss"]) == ("nan", "nan")
    assert rows["6"]["status"] == "failed"
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines}) == 1


def test_runs_of_one_name_and_settings_of_one_ending_stay_apart(tmp_path):
    make_run(tmp_path / "a" / "0", [1.0], ["model.name=x", "dataset.name=y"])
    make_run(tmp_path / "b" / "0", [2.0], ["model.name=y", "dataset.name=y"])
    make_run(tmp_path / "c" / "0", [3.0], ["model.name=x", "dataset.name=z"])
    runs = reading.find_runs([tmp_path])
    labels = [reading.label(run, reading.differing(runs)) for run in runs]
    assert labels == ["model.name=x, dataset.name=y", "model.name=y, dataset.name=y", "model.name=x, dataset.name=z"]
    compare.report(runs, tmp_path / "out")
    assert [row["run"] for row in read_table(tmp_path / "out")] == ["a/0", "b/0", "c/0"]


@pytest.mark.slow
def test_folder_of_another_run_keeps_its_own_settings_and_results(tmp_path, capsys):
    fast = [*TINY, f"hydra.run.dir={tmp_path}"]
    assert call_main(*fast, "seed=1") == 0
    before = reading.read_run(tmp_path)
    assert call_main(*fast, "seed=2") == 2
    assert "holds the results of another run" in capsys.readouterr().err
    assert reading.read_run(tmp_path) == before
    assert before.settings["seed"] == "1"


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_has_a_row_a_run_with_what_differs_and_what_became_of_it(folders, tmp_path):
    compare.report(reading.find_runs([folders]), tmp_path / "out")
    complete, interrupted, failed = read_table(tmp_path / "out")
    assert [row["run"] for row in (complete, interrupted, failed)] == ["0", "2", "10"]
    assert "num_rounds" not in complete
    assert (complete["model.quantization"], complete["seed"], complete["status"]) == ("4", "1", "complete")
    assert (complete["final loss"], complete["best loss"], complete["bytes"]) == ("1.5", "1.0", "90")
    assert complete["seconds"] == "7.5"
    assert (interrupted["status"], interrupted["final loss"], interrupted["bytes"]) == ("interrupted", "3.0", "30")
    assert (failed["status"], failed["error"], failed["final loss"]) == ("failed", "no such | file at all", "")
    lines = (tmp_path / "out" / "sweep.md").read_text().splitlines()
    assert len(lines) == 5
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1  # every row has all columns
    assert (tmp_path / "out" / "train_loss.png").read_bytes().startswith(b"\x89PNG")


def test_labels_say_only_what_differs(folders):
    runs = reading.find_runs([folders])
    keys = reading.differing(runs)
    assert [reading.label(run, keys) for run in runs] == [
        "quantization=4, seed=1",
        "quantization=8, seed=1",
        "quantization=8, seed=2",
    ]


def test_any_run_folders_can_be_compared(folders, tmp_path, capsys, monkeypatch):
    other = make_run(tmp_path / "old", [1.0], ["seed=3"])
    monkeypatch.setattr(sys, "argv", ["compare", str(folders / "0"), str(other), f"--output={tmp_path}"])
    assert compare.main() == 0
    assert capsys.readouterr().out.count("| complete |") == 2
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "nothing")])
    assert compare.main() == 2
    assert "nothing: no run folder there" in capsys.readouterr().err


def test_resumed_sweep_must_be_one_and_have_the_same_settings(tmp_path):
    with pytest.raises(SettingsError, match="not the folder of a grid sweep"):
        resumed_sweep([f"resume_sweep={tmp_path}"])
    noted = ["hydra.mode=MULTIRUN", "hydra.sweep.dir=x", "hydra/launcher=joblib"]
    (tmp_path / "multirun.yaml").write_text(
        json.dumps({"hydra": {"overrides": {"task": ["seed=1,2"], "hydra": noted}}})
    )
    own = ["--multirun", "seed=1,2", "hydra/launcher=joblib"]
    place = [f"resume_sweep={tmp_path}", f"hydra.sweep.dir={tmp_path}"]
    assert resumed_sweep([f"resume_sweep={tmp_path}"]) == [*own, *place]
    assert resumed_sweep([*own, f"resume_sweep={tmp_path}"]) == [*own, *place]
    harmless = "train.micro_batch_size=2"
    assert resumed_sweep([f"resume_sweep={tmp_path}", harmless]) == [*own, harmless, *place]
    with pytest.raises(SettingsError, match="was started with seed=1,2 hydra/launcher=joblib; repeat that"):
        resumed_sweep(["--multirun", "seed=1,3", f"resume_sweep={tmp_path}"])
    assert resumed_sweep(["seed=1"]) == ["seed=1"]


# --- sweeps, for real -----------------------------------------------------------------------------


def start_sweep(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "main.py", *arguments], cwd=SUITE, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_sweep_goes_on_behind_a_failing_job_and_leaves_nothing_behind(tmp_path, capsys):
    data = ",".join(["quickstart/data/train.jsonl", "/no/such/file.jsonl"])
    sweep = start_sweep("--multirun", *TINY, f"dataset.name={data}", "seed=1,2", f"hydra.sweep.dir={tmp_path}",
                        "tracker=tensorboard")  # fmt: skip
    lines = []
    for line in sweep.stdout:
        lines.append(line)
        if "Launching" not in line and "[HYDRA]" in line and "#0" not in line:  # between two jobs
            assert not [pid for pid in children(sweep.pid) if "spawn_main" in command(pid)]
    assert sweep.wait() == 1, "".join(lines)
    rows = read_table(tmp_path)
    assert [(row["dataset.name"], row["seed"], row["status"]) for row in rows] == [
        ("quickstart/data/train.jsonl", "1", "complete"),
        ("quickstart/data/train.jsonl", "2", "complete"),
        ("/no/such/file.jsonl", "1", "failed"),
        ("/no/such/file.jsonl", "2", "failed"),
    ]
    assert "dataset.name=/no/such/file.jsonl: there is no such file or folder" in rows[2]["error"]
    assert f"sweep: 2 of 4 runs complete; see {tmp_path / 'sweep.md'}" in lines[-1]
    assert list((tmp_path / "0").glob("events.out.tfevents.*"))

    finished = (tmp_path / "1" / "results.json").stat().st_mtime_ns
    (tmp_path / "0" / "results.json").unlink()  # as if killed in the last moment
    assert call_main(f"resume_sweep={tmp_path}") == 1
    assert [row["status"] for row in read_table(tmp_path)] == ["complete", "complete", "failed", "failed"]
    assert (tmp_path / "1" / "results.json").stat().st_mtime_ns == finished
    assert capsys.readouterr().out.count("resumed after round 1") == 1


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


EIGHT = [
    "--multirun", "experiment=quickstart", "dataset.eval_name=null", "num_rounds=2",
    "train.training_arguments.max_steps=4",
    "model.quantization=8,4", "strategy.fraction_fit=0.1,0.2", "seed=1,2",
]  # fmt: skip


@pytest.mark.slow
def test_eight_jobs_do_not_leak_and_a_killed_sweep_goes_on(tmp_path):
    sweep = start_sweep(*EIGHT, f"hydra.sweep.dir={tmp_path / 'whole'}")
    output, _ = sweep.communicate(timeout=400)
    assert sweep.returncode == 0, output
    rows = read_table(tmp_path / "whole")
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"complete"}
    memory = [
        read_json_lines(tmp_path / "whole" / str(job) / "metrics.jsonl")[-1]["server_peak_memory_bytes"]
        for job in range(8)
    ]
    print("the driver's memory after each job, MB:", [round(count / 1e6) for count in memory])
    assert memory[7] <= 1.1 * memory[1]

    killed = start_sweep(*EIGHT, f"hydra.sweep.dir={tmp_path / 'killed'}")
    for line in killed.stdout:
        if "#3" in line:
            break
    workers = children(killed.pid)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_for_end(workers)
    done = {job: (tmp_path / "killed" / str(job) / "results.json").stat().st_mtime_ns for job in range(3)}
    again = start_sweep(*EIGHT, f"resume_sweep={tmp_path / 'killed'}")
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0, output
    assert {job: (tmp_path / "killed" / str(job) / "results.json").stat().st_mtime_ns for job in done} == done
    same = ("model.quantization", "strategy.fraction_fit", "seed", "final loss", "bytes", "status")
    assert [[row[key] for key in same] for row in read_table(tmp_path / "killed")] == [
        [row[key] for key in same] for row in rows
    ]


@pytest.mark.slow
def test_optuna_minimises_the_returned_loss(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweep = start_sweep(
        "--multirun", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1", "experiment=quickstart", "num_rounds=2",
        "train.learning_rate_max=interval(0.0002,0.01)", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    output, _ = sweep.communicate(timeout=400)
    assert sweep.returncode == 0, output
    rows = read_table(tmp_path)
    best = min(rows, key=lambda row: float(row["held-out loss"]))  # the quickstart holds rows out
    assert len(rows) == 5
    assert "Best parameters" in output
    assert f"Best value: {best['held-out loss']}" in output
    assert best["train.learning_rate_max"] in output.split("Best parameters")[1]


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = start_sweep("--multirun", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *TINY, "seed=1,2",
                        f"hydra.sweep.dir={tmp_path}", "dataset.name=quickstart/data/train.jsonl,/no/such")  # fmt: skip
    output, _ = sweep.communicate(timeout=400)
    assert sweep.returncode == 1, output
    assert sorted(row["status"] for row in read_table(tmp_path)) == ["complete"] * 2 + ["failed"] * 2


@pytest.mark.parametrize("written", ["dry_run=true", "dry_run=True", "+dry_run=1"])
def test_dry_runs_of_a_sweep_are_no_failures(written, tmp_path):
    settings = OmegaConf.create({"hydra": {"overrides": {"task": [written]}, "sweep": {"dir": str(tmp_path)}}})
    compare.SweepReport.failed = False
    compare.SweepReport().on_multirun_end(settings)
    assert not compare.SweepReport.failed
    assert not (tmp_path / "sweep.md").exists()


def test_command_line_waits_for_no_library_of_tables_and_pictures():
    code = "import main, sys; print([name for name in ('runs.compare', 'pandas', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=SUITE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['runs.compare']"


def test_comparison_shows_what_it_wrote_and_leaves_out_what_never_ran(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "outputs/1", [0.5])
    (tmp_path / "outputs/2/.hydra").mkdir(parents=True)
    (tmp_path / "baselines.md").write_text("of another comparison")
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "outputs"), f"--output={tmp_path}"])
    assert compare.main() == 0
    said = capsys.readouterr()
    assert "of another" not in said.out
    assert "left out: 1 folders" in said.err
    assert "baselines" not in said.err
