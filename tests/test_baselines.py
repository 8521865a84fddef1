"""Beside the federation: each client alone and all data in one place, with as many steps and rows."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import client
from client import GLOBAL_SET, Worker, evaluate_adapter, fine_tune
from exchange.scores import figures
from learning.training import Task
from runs import baselines
from runs.reading import find_runs
from settings.schema import SettingsError
from tests.federation import Clients, call_main, play, run_locally, small
from tests.test_client import start
from tests.test_compare import make_run
from utils import cosine_learning_rate, write_json

FEDERATION = ["num_clients=4", "strategy.fraction_fit=0.5", "num_rounds=3"]
EVAL = "dataset.eval_name=quickstart/data/heldout.jsonl"


def effort(folder, models=1):
    found = json.loads((folder / "results.json").read_text())
    return found["optimizer_steps"] / models, found["rows_trained"] / models


def test_every_model_takes_as_many_steps_on_as_many_rows(tmp_path):
    runs = {}
    for name in ("null", "alone", "central"):
        config = small(*FEDERATION, f"baseline={name}", EVAL)
        values = dict.fromkeys(range(10), 1.0)
        play(config, tmp_path / name, Clients(config, losses=values))
        runs[name] = effort(tmp_path / name, 4 if name == "alone" else 1)
    assert set(runs.values()) == {(3 * 2 * 2, 3 * 2 * 2 * 4)}  # rounds, clients, steps of each; rows of a step


def test_baseline_changes_nothing_but_what_it_is_about():
    config, central, alone = (
        small(*FEDERATION, "strategy=fedadam", "strategy.max_bytes=1e9", "train.baseline_learning_rate_max=1e-3", *more)
        for more in ([], ["baseline=central"], ["baseline=alone", "dataset/partitioner=dirichlet"])
    )
    assert (central.num_clients, central.num_rounds, central.clients_per_round) == (1, 6, 1)
    assert (alone.num_clients, alone.num_rounds, alone.clients_per_round) == (4, 6, 4)
    assert alone.dataset.partitioner["_target_"].endswith("DirichletPartitioner")
    for baseline in (central, alone):
        assert baseline.train.learning_rate_max == 1e-3 != config.train.learning_rate_max
        assert baseline.train.training_arguments == config.train.training_arguments
        assert (baseline.seed, baseline.model, baseline.dataset.name) == (0, config.model, config.dataset.name)
        assert baseline.sampling.max_bytes is None
        assert "eta" not in baseline.strategy


@pytest.mark.slow
def test_client_alone_is_trained_and_measured_by_itself(tmp_path):
    for name, count in (("train", 40), ("heldout", 10)):
        lines = Path(f"quickstart/data/{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = small(
        f"dataset.name={tmp_path / 'train.jsonl'}", f"dataset.eval_name={tmp_path / 'heldout.jsonl'}",
        "num_clients=2", "strategy.fraction_fit=0.5", "num_rounds=3", "baseline=alone",
        "evaluate.every_rounds=3", "train.training_arguments.max_steps=1",
    )  # fmt: skip
    federation, _ = run_locally(config, tmp_path / "run")
    client._resident.clear()
    worker, losses = Worker(config), []
    for partition_id in (0, 1):
        adapter, seen = start(config), 0
        for number in (1, 2, 3):
            rate = cosine_learning_rate(number, 3, config.train.learning_rate_max, config.train.learning_rate_min)
            adapter, report = fine_tune(worker, adapter, partition_id, Task(number, rate, first_row=seen))
            seen += report["rows"]
        for name, value in adapter.items():  # by partition: Flower's node ids are others when a run is resumed
            np.testing.assert_array_equal(federation.strategy.own[f"{partition_id}/{name}"], value)
        losses.append(figures(evaluate_adapter(worker, adapter, GLOBAL_SET))["loss"])
    found = federation.record.metrics[-1]["held_out"]["global"]
    assert found["loss"] == pytest.approx(sum(losses) / 2)
    before = federation.record.metrics[0]["held_out_before"]["global"]
    assert found["tokens"] == 2 * before["tokens"]  # nobody has trained before: one client is enough
    assert losses[0] != losses[1]


def arm(folder, number, name, seed, loss, exact, before=None, steps=6, clients=1, partitioner="iid"):
    overrides = [f"baseline={name}", f"seed={seed}", f"dataset/partitioner={partitioner}"]
    run = make_run(folder / str(number), [1.0], overrides)
    line = {"round": 1, "train_loss": 1.0, "num_examples": {str(p): 10 for p in range(clients)}}
    line |= {"held_out": {"global": {"loss": loss, "exact_match": exact}}}
    line |= {"held_out_before": {"global": {"loss": before, "exact_match": 0.0}}} if before else {}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    facts = {"final_train_loss": 1.0, "optimizer_steps": steps * clients, "rows_trained": 8 * steps * clients}
    facts |= {"clients_used": clients}
    write_json(run / "results.json", facts)


@pytest.fixture
def sweep(tmp_path):
    arm(tmp_path, 0, "null", 0, 0.20, 0.5, before=2.0)
    arm(tmp_path, 1, "null", 1, 0.30, 0.7, before=2.0)
    arm(tmp_path, 2, "alone", 0, 1.0, 0.1, clients=4)
    arm(tmp_path, 3, "alone", 1, 1.2, 0.3, clients=4)
    arm(tmp_path, 4, "central", 0, 0.2, 0.6)
    arm(tmp_path, 5, "central", 1, 0.2, 0.6)
    return tmp_path


def test_table_and_picture_equal_hand_arithmetic(sweep):
    text = baselines.report(find_runs([sweep]), sweep)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0][2:] == ["base model", "each client alone", "federated", "central", "federated / central"]
    # means of the two seeds with their standard deviations: |a - b| / sqrt(2)
    figures = ["2.000 ± 0.000", "1.100 ± 0.141", "0.250 ± 0.071", "0.200 ± 0.000", "1.25"]
    assert lines[2] == ["all", "held-out loss", *figures]
    assert lines[3][1:5] == ["exact match", "0.000 ± 0.000", "0.200 ± 0.141", "0.600 ± 0.141"]
    assert text.endswith("Each model was trained for 6 optimizer steps on 48 rows, repetitions counted.\n")
    assert (sweep / "baselines.png").read_bytes().startswith(b"\x89PNG")
    with (sweep / "baselines.csv").open() as file:
        rows = {(row["metric"], row["arm"]): row for row in csv.DictReader(file)}
    assert float(rows["loss", "each client alone"]["mean"]) == pytest.approx(1.1)
    assert rows["loss", "federated"]["steps"] == "6"


def test_unequal_effort_is_told_and_what_differs_gets_its_own_lines(sweep):
    arm(sweep, 6, "null", 0, 0.4, 0.4, before=2.0, steps=5, partitioner="dirichlet")
    arm(sweep, 7, "central", 0, 0.3, 0.4, steps=5, partitioner="dirichlet")
    arm(sweep, 8, "null", 0, 0.4, 0.4, before=2.0, partitioner="nothing to compare with")
    (sweep / "9").mkdir()
    text = baselines.report(find_runs([sweep]), sweep)
    assert "partitioner=iid | held-out loss" in text
    assert "partitioner=dirichlet | held-out loss | 2.000 |  | 0.400 | 0.300 | 1.33 |" in text
    assert "nothing to compare" not in text
    assert "Warning: the models were not trained equally: steps and rows of 5 and 40, 6 and 48." in text


def test_loss_that_is_no_number_is_told_and_left_out_of_no_mean(sweep):
    arm(sweep, 6, "null", 2, float("nan"), 0.6, before=2.0)
    text = baselines.report(find_runs([sweep]), sweep)
    assert "| all | held-out loss | 2.000 ± 0.000 | 1.100 ± 0.141 | nan ± nan | 0.200 ± 0.000 |  |" in text
    assert "| all | exact match | 0.000 ± 0.000 | 0.200 ± 0.141 | 0.600 ± 0.100 | 0.600 ± 0.000 | 1.00 |" in text
    assert (sweep / "baselines.png").exists()


def test_baseline_needs_a_rate_above_the_lowest():
    with pytest.raises(SettingsError, match="train.baseline_learning_rate_max=1e-05: use at least"):
        small("baseline=central", "train.baseline_learning_rate_max=1e-5")


def test_deployed_federation_has_no_baselines(tmp_path, monkeypatch, capsys):
    import app

    monkeypatch.chdir(tmp_path)
    context = type("Context", (), {"run_config": {"overrides": "experiment=quickstart baseline=central"}})
    with pytest.raises(SettingsError, match="baseline=central: compares in a simulation only"):
        app.serve(None, context)
    assert "error: baseline=central" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_command_compares(tmp_path, capsys):
    settings = ["seed=0", "dataset/partitioner=iid", "num_rounds=1", "train.training_arguments.max_steps=2"]
    folder = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    assert call_main("experiment=baselines", *settings, "evaluate.answers=4", folder) == 0
    out = capsys.readouterr().out
    assert "Each model was trained for 4 optimizer steps on 32 rows, repetitions counted." in out
    assert "sweep: 3 of 3 runs complete" in out
    assert (tmp_path / "sweep" / "baselines.png").exists()
