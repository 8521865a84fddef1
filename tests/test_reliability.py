"""The fault matrix of docs/reliability.md: every fault for real, and what is left of the run afterwards."""

import dataclasses
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from omegaconf import OmegaConf
from safetensors.numpy import load_file

import app
import client
from dataset import load_rows
from exchange.faults import SETTINGS_ERROR
from exchange.guard import outliers
from exchange.transfer import to_record
from learning import training
from runs import checkpoint, runfolder, stopping
from runs.stopping import SIGNALS
from settings.compose import compose
from settings.overrides import parsed, to_type
from settings.resume import resumed_sweep
from settings.schema import RunError, SettingsError
from tests.federation import (
    SMALL,
    Clients,
    LocalGrid,
    call_main,
    children,
    make_federation,
    often,
    outcome,
    play,
    run_locally,
    small,
    wait_for_end,
)
from utils import read_json_lines

SUITE = Path(__file__).parent.parent
SIX = ["num_rounds=6", "train.save_every_round=2", "num_clients=8", "strategy.fraction_fit=0.5"]


def interrupted_in(number: int):
    def bad(partition, current, reply):
        if current == number:
            raise RuntimeError("stopped")
        return reply

    return bad


# --- resume ---------------------------------------------------------------------------------------

STRATEGIES = {
    "FedAvg": [],
    "FedAvgM": ["strategy=fedavgm"],
    "FedAdam": ["strategy=fedadam"],
    "FedYogi": ["strategy._target_=flwr.serverapp.strategy.FedYogi", "strategy.eta=1e-3"],
    "FedAdagrad": ["strategy._target_=flwr.serverapp.strategy.FedAdagrad", "strategy.eta=1e-3"],
    "a strategy around another": [
        "strategy._target_=flwr.serverapp.strategy.DifferentialPrivacyServerSideFixedClipping",
        "+strategy.strategy={_target_: flwr.serverapp.strategy.FedAdam, eta: 1e-3}", "strategy.noise_multiplier=0",
        "strategy.clipping_norm=0.5", "strategy.num_sampled_clients=4",
    ],
    "int8": ["transfer=int8", "strategy=fedavgm"],
    "each client alone": ["baseline=alone"],
}  # fmt: skip


@pytest.mark.parametrize("name", often(STRATEGIES, "FedAdam", "int8"))
def test_run_that_goes_on_ends_like_one_that_was_never_interrupted(name, tmp_path):
    config = small(*SIX, *STRATEGIES[name])
    play(config, tmp_path / "whole")
    for number in (2, 4, 6):  # three processes die, in rounds with and without a checkpoint before
        with pytest.raises(RuntimeError, match="stopped"):
            play(config, tmp_path / "torn", Clients(config, interrupted_in(number)), resumes=number > 2)
        assert (tmp_path / "torn" / f"peft_{number - 1}").is_dir(), "the last whole round was not kept"
    play(config, tmp_path / "torn", resumes=True)
    assert outcome(tmp_path / "torn") == outcome(tmp_path / "whole")


def cut(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def drop(file: Path, _: random.Random) -> None:
    file.unlink()


FILES = ["adapter_model.safetensors", "adapter_config.json", "strategy.safetensors", "state.json", "sha256.json"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = small(*SIX, "strategy=fedadam")
    play(config, folder)
    return config, folder


@pytest.mark.parametrize("damage", often([cut, flip, drop], flip))
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_found_and_the_one_before_is_used(name, damage, whole_run, tmp_path):
    config, whole = whole_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    damage(folder / "peft_6" / name, random.Random(name))
    federation = play(config, folder, resumes=True)
    assert any("peft_6 cannot be used (damaged: " in warning for warning in federation.progress.warnings)
    assert [record["round"] for record in federation.progress.rounds] == [5, 6]
    assert outcome(folder) == outcome(whole)


@pytest.mark.parametrize("offset", [0, 1, 500, 2000])
def test_metrics_cut_anywhere_cost_only_the_rounds_that_they_lack(offset, whole_run, tmp_path):
    config, whole = whole_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    size = (folder / "metrics.jsonl").stat().st_size
    os.truncate(folder / "metrics.jsonl", max(0, size - 1 - offset))
    play(config, folder, resumes=True)
    assert outcome(folder) == outcome(whole)


def test_all_checkpoints_damaged_starts_again_and_says_so(whole_run, tmp_path):
    config, whole = whole_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for number in (2, 4, 6):
        cut(folder / f"peft_{number}" / "state.json", random.Random(number))
    federation = play(config, folder, resumes=True)
    assert len(federation.progress.warnings) == 3
    assert len(federation.progress.rounds) == 6
    assert outcome(folder) == outcome(whole)


def test_as_many_checkpoints_are_kept_as_asked_and_the_best(tmp_path):
    config = small(*SIX, "train.save_every_round=1", "train.keep_checkpoints=2")
    play(config, tmp_path)
    assert runfolder.rounds_in(tmp_path) == [6, 5]


@pytest.mark.parametrize(
    ("there", "keep", "best", "spare", "left"),
    [
        ([1, 2, 3, 4, 5, 6], 2, 3, [], [6, 5, 3]),
        ([1, 2, 3, 4, 5, 6], 2, 6, [], [6, 5, 4]),  # two besides the best
        ([1, 2, 3], None, None, [], [3, 2, 1]),
        ([1, 3, 6, 7, 8], 2, 7, [1, 7], [8, 7, 6]),
        ([2, 4, 6, 8, 9], None, None, [], [9, 8, 6, 4, 2]),  # 9: a run was stopped there
        ([5, 7, 10], None, 10, [7], [10, 5]),
        ([5, 7], None, 5, [7], [7, 5]),  # the newest stays, to go on from
    ],
)
def test_checkpoints_that_need_not_stay_are_removed(there, keep, best, spare, left, tmp_path):
    for number in there:
        (tmp_path / f"peft_{number}").mkdir()
    checkpoint.prune(tmp_path, keep, best, spare)
    assert runfolder.rounds_in(tmp_path) == left


class Torn(FedAvg):
    """Raises in round 4, after half of its work."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.momentum = np.zeros(3)

    def aggregate_train(self, server_round, replies):
        self.momentum += server_round  # in place
        if server_round == 4:
            raise ArithmeticError("half done")
        return super().aggregate_train(server_round, replies)


def test_rounds_before_one_that_tears_are_kept_with_the_strategys_state_of_then(tmp_path):
    config = small(*SIX, "train.save_every_round=100", "strategy._target_=tests.test_reliability.Torn")
    with pytest.raises(RunError, match="round 4: Torn cannot aggregate 4 replies: half done"):
        play(config, tmp_path)
    assert runfolder.rounds_in(tmp_path) == [3]
    values = load_file(tmp_path / "peft_3" / "strategy.safetensors")
    assert values["momentum|"].tolist() == [6, 6, 6]  # 1 + 2 + 3


def test_file_that_can_not_be_read_now_is_no_damage(whole_run, tmp_path, monkeypatch):
    config, whole = whole_run
    shutil.copytree(whole, tmp_path / "run")

    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.adapters, "load_adapter", broken)
    with pytest.raises(RunError, match="a checkpoint cannot be read .*Input/output error"):
        play(config, tmp_path / "run", resumes=True)
    assert runfolder.rounds_in(tmp_path / "run") == [6, 4, 2]


def test_metrics_without_any_checkpoints_rounds_are_not_thrown_away(whole_run, tmp_path):
    config, whole = whole_run
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(SettingsError, match="lacks round 1, which all checkpoints need"):
        play(config, tmp_path / "run", resumes=True)
    assert runfolder.rounds_in(tmp_path / "run") == [6, 4, 2]


class Counting(FedAvg):
    """A strategy with state of all kinds, made in and after its first round; `odd` is no kind that can be kept."""

    def __init__(self, odd=False, **arguments):
        super().__init__(**arguments)
        self.seen, self.names, self.norm = 0, [], np.float64(0)
        if odd:
            self.odd = {3: np.zeros(2)}

    def aggregate_train(self, server_round, replies):
        self.seen += len(replies)
        self.names, self.norm = [*self.names, f"round {server_round}"], self.norm + 0.1
        self.late = [np.full(2, server_round)]
        return super().aggregate_train(server_round, replies)


def test_own_strategy_comes_back_with_whatever_it_remembered(tmp_path):
    config = small(*SIX, "strategy._target_=tests.test_reliability.Counting")
    with pytest.raises(RuntimeError, match="stopped"):
        play(config, tmp_path, Clients(config, interrupted_in(4)))
    strategy = play(config, tmp_path, resumes=True).strategy
    assert (strategy.seen, strategy.names[-1], len(strategy.names)) == (24, "round 6", 6)
    assert strategy.norm == pytest.approx(0.6)
    assert strategy.late[0].tolist() == [6, 6]


def test_strategy_that_can_not_be_brought_back_is_refused(tmp_path):
    config = small(*SIX, "strategy._target_=tests.test_reliability.Counting", "strategy.odd=true")
    play(config, tmp_path)
    with pytest.raises(SettingsError, match="odd of Counting is nothing that a checkpoint can keep"):
        play(config, tmp_path, resumes=True)


# --- the run folder -------------------------------------------------------------------------------


def test_folder_belongs_to_one_process_and_one_run(tmp_path):
    config = small()
    with runfolder.claimed(tmp_path, config, ["seed=1"]) as resumes:
        assert not resumes
        with (
            pytest.raises(SettingsError, match="another process is at work there"),
            runfolder.claimed(tmp_path, config, []),
        ):
            pass
    assert {file.name for file in tmp_path.iterdir()} == {"settings.json", ".lock"}
    with runfolder.claimed(tmp_path, small("seed=2"), []) as resumes:  # the first one ended before it had a round
        assert not resumes
    with runfolder.claimed(tmp_path, config, []):
        (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(SettingsError, match="holds the results of another run; choose another folder, or resume="):
        runfolder.claimed(tmp_path, config, []).__enter__()
    with runfolder.claimed(tmp_path, compose([f"resume={tmp_path}"]), []) as resumes:
        assert resumes


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("seed=3", False),
        ("num_rounds=9", False),
        ("strategy.max_norm_ratio=3.0", False),
        ("model.lora.r=8", False),
        ("train.micro_batch_size=1", True),
        ("client_resources.num_cpus=2", True),
        ("train.keep_checkpoints=2", True),
        ("tracker=tensorboard", True),
    ],
)
def test_run_goes_on_only_with_settings_that_give_the_same_results(override, allowed, tmp_path):
    with runfolder.claimed(tmp_path, small(), []):
        pass
    config = compose([override, f"resume={tmp_path}"])
    if allowed:
        with runfolder.claimed(tmp_path, config, []):
            pass
    else:
        with pytest.raises(SettingsError, match=f"{override}: the run in .* has .*only these may change"):
            runfolder.claimed(tmp_path, config, []).__enter__()


def test_run_does_not_go_on_with_other_rows(tmp_path):
    with runfolder.claimed(tmp_path, small(), []):
        runfolder.check_data(tmp_path, {"rows": 3, "sha256": "a"})
        runfolder.check_data(tmp_path, {"rows": 3, "sha256": "a"})
        with pytest.raises(SettingsError, match="was started with other rows"):
            runfolder.check_data(tmp_path, {"rows": 3, "sha256": "b"})


def write_settings(folder: Path, *overrides: str, **values) -> None:
    """A settings.json as runs note it: what `small` is, and over it values that a stranger may have written."""
    noted = dataclasses.asdict(small())
    for key, value in values.items():
        section, _, name = key.partition("__")
        if name:
            noted[section][name] = value
        else:
            noted[section] = value
    (folder / "settings.json").write_text(json.dumps({"overrides": [*SMALL, *overrides], "settings": noted}))


def test_resume_stands_for_the_values_that_the_run_noted(tmp_path):
    write_settings(tmp_path, "seed=1", seed=1, num_rounds=7)
    config = compose([f"resume={tmp_path}"])
    assert (config.seed, config.num_rounds, config.model.lora["r"], config.resume) == (1, 7, 4, str(tmp_path))
    assert config == compose([*SMALL, "seed=1", f"resume={tmp_path}"]), "what is repeated changes nothing"
    assert compose([f"resume={tmp_path}", "ray.address=auto"]).ray.address == "auto"
    runfolder.check_same(tmp_path, compose([f"resume={tmp_path}", "client_resources.num_cpus=2"]))
    with pytest.raises(SettingsError, match="seed=2: the run in .* has seed=1; only these may change"):
        runfolder.check_same(tmp_path, compose([f"resume={tmp_path}", "seed=2"]))
    with pytest.raises(SettingsError, match="strategy=fedadam: a run keeps its settings when it is resumed"):
        compose([f"resume={tmp_path}", "strategy=fedadam"])
    assert compose(["seed=1", "resume=null"]).resume is None


def test_resumed_baseline_is_not_multiplied_again(tmp_path):
    for name in ("alone", "central"):
        config = small(f"baseline={name}", "strategy.fraction_evaluate=0.5", "dataset.holdout=0.2")
        (tmp_path / "settings.json").write_text(json.dumps({"overrides": [], "settings": dataclasses.asdict(config)}))
        assert runfolder.changed_settings(tmp_path, compose([f"resume={tmp_path}"])).keys() == {"resume"}


def test_settings_that_came_after_the_run_have_their_default(tmp_path):
    write_settings(tmp_path)
    content = json.loads((tmp_path / "settings.json").read_text())
    del content["settings"]["evaluate"]["answers"], content["settings"]["tracker"]
    (tmp_path / "settings.json").write_text(json.dumps(content))
    assert compose([f"resume={tmp_path}"]).evaluate.answers == 0


def test_run_stays_in_its_folder_and_is_no_sweep(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    write_settings(run)
    for wrong, said in (
        (f"hydra.run.dir={tmp_path / 'other'}", f"hydra.run.dir={tmp_path / 'other'}: the run stays in resume={run}"),
        ("--multirun", f"resume={run}: resumes one run; use resume_sweep=FOLDER for a sweep"),
    ):
        assert call_main(f"resume={run}", wrong) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"overrides": [1], "settings": {}}', "\0"])
def test_folder_without_readable_settings_gets_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    assert call_main(f"resume={tmp_path}") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("evil", "again"),
    [
        ({"strategy___target_": "os.system"}, "strategy._target_=os.system"),
        ({"strategy__x": {"_target_": "os.system"}}, "strategy.x._target_=os.system"),
        ({"strategy__x": [{"_target_": "os.system"}]}, "strategy.x=[]"),
        ({"strategy__f": {"_target_": "flwr.serverapp.strategy.bulyan.np.load"}}, "strategy.f={}"),
        ({"strategy___target_": "server.strategies.Alone"}, "strategy._target_=server.strategies.Alone"),
        ({"dataset__partitioner": {"_target_": "os.system"}}, "dataset.partitioner._target_=os.system"),
        ({"model__trust_remote_code": True}, "model.trust_remote_code=true"),
        ({"seed": "${oc.env:HOME}"}, "seed=1"),
        ({"dataset__name": "${oc.env:HOME}"}, "dataset.name=x"),
        ({"ray__address": "evil:1"}, "ray.address=evil:1"),
        ({"tracker": "wandb"}, "tracker=wandb"),
        ({"model__cache_folder": "/home/you"}, "model.cache_folder=/home/you"),
    ],
)
def test_strangers_run_folder_can_not_run_code(evil, again, tmp_path):
    write_settings(tmp_path, *([again] if "=os" in again else []), **evil)
    with pytest.raises(SettingsError, match="which can run code, .*elsewhere; give it again"):
        compose([f"resume={tmp_path}"])
    config = compose([f"resume={tmp_path}", again])
    given = parsed(again)
    assert OmegaConf.select(OmegaConf.create(dataclasses.asdict(config)), given.key_or_group) == given.value()


@pytest.mark.slow
def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [[sys.executable, SUITE / "main.py", "dry_run=true", "experiment=quickstart"] for _ in range(2)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [run.communicate(timeout=300)[0] for run in runs]
    folders = {line.split()[-1] for text in said for line in text.splitlines() if line.startswith("results ")}
    assert len(folders) == 2, said
    first, second, third = runfolder.new_folder(tmp_path), runfolder.new_folder(tmp_path), runfolder.run_folder(None)
    assert len({first, second, Path(third).resolve()}) == 3


@pytest.mark.slow
def test_paths_are_as_seen_from_where_the_command_is_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = SUITE / "quickstart" / "data" / "train.jsonl"
    (tmp_path / "my rows.jsonl").write_bytes(rows.read_bytes())
    short = [text for text in SMALL if "num_rounds" not in text]
    inside = ["hydra.job.chdir=true", "hydra.run.dir=here/run", "dataset.name=my rows.jsonl", "num_rounds=1"]
    assert call_main(*short, *inside) == 0
    assert os.listdir("here") == ["run"]
    (tmp_path / "here" / "run" / "results.json").unlink()
    assert call_main("hydra.job.chdir=true", "resume=here/run") == 0
    assert "resumed after round 1" in capsys.readouterr().out


def test_nothing_of_a_strangers_command_line_is_run(tmp_path):
    """Only values are read: what the noted command line says has no meaning when the run is resumed."""
    write_settings(tmp_path, "+hydra.callbacks.x._target_=os.system", "--config-dir=/tmp/evil", "seed=${oc.env:HOME}")
    assert compose([f"resume={tmp_path}"]).seed == 0


def test_harmless_settings_are_not_asked_for_again(tmp_path):
    write_settings(tmp_path, model__name="/data/my model", tracker="tensorboard", seed=3,
                   strategy___target_="flwr.serverapp.strategy.FedYogi", dataset__split="a$b")  # fmt: skip
    config = compose([f"resume={tmp_path}"])
    assert (config.model.name, config.strategy["_target_"], config.seed, config.dataset.split) == (
        "/data/my model", "flwr.serverapp.strategy.FedYogi", 3, "a$b"
    )  # fmt: skip


def test_command_to_resume_says_what_has_to_be_said_again(tmp_path):
    folder = tmp_path / "it's (1)"
    folder.mkdir()
    write_settings(folder, strategy___target_="my.own.Strategy")
    assert runfolder.command_to_resume(folder) == ""
    (folder / "peft_3").mkdir()
    command = runfolder.command_to_resume(folder)
    assert command.endswith(" strategy._target_=my.own.Strategy")
    config = compose(shlex.split(command)[2:])
    assert (config.resume, config.strategy["_target_"]) == (str(folder), "my.own.Strategy")


@pytest.mark.parametrize(
    "evil",
    [
        "+hydra.callbacks.x={_target_: numpy.load}",
        "hydra/launcher=../../evil",
        "hydra.launcher.python=/tmp/evil",
        "hydra.sweeper._target_=os.system",
        "hydra.searchpath=[/tmp]",
        "experiment=../../evil",
        "+experiment@hydra=quickstart",
        "~hydra.callbacks",
        "'hydra.verbose=true'",
        "--config-dir=/tmp/evil",
        "seed=${oc.env:HOME}",
        "strategy._target_=flwr.serverapp.strategy.FedAvg,os.system",
        "+strategy.strategy={_target_: os.system}",
        "+strategy.strategy={'_target_':'os.system'}",
        "strategy._target_='os.system'",
        "model.trust_remote_code=true,false",
        "ray.address=evil:1",
        "model.cache_folder=/home/you",
        "tracker=wandb",
    ],
)
def test_strangers_sweep_can_not_run_code(evil, tmp_path):
    noted = {"hydra": ["hydra.mode=MULTIRUN"], "task": ["seed=1,2", evil]}
    (tmp_path / "multirun.yaml").write_text(json.dumps({"hydra": {"overrides": noted}}))
    with pytest.raises(SettingsError, match="which can run code, "):
        resumed_sweep([f"resume_sweep={tmp_path}"])
    if not evil.startswith("-"):
        assert evil in resumed_sweep([f"resume_sweep={tmp_path}", evil])
    assert resumed_sweep(["resume_sweep=null", "seed=1"]) == ["resume_sweep=null", "seed=1"]


@pytest.mark.parametrize("name", ["settings.json.tmp", ".lock", "metrics.jsonl", "peft_1/state.json"])
def test_links_in_a_strangers_folder_are_not_followed(name, tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    (folder / name).parent.mkdir(parents=True)
    write_settings(folder, "seed=1")
    (folder / name).symlink_to(victim)
    with pytest.raises(SettingsError, match="holds links"):
        compose([f"resume={folder}"])
    config = small()
    config.resume = str(folder)
    with pytest.raises(SettingsError), runfolder.claimed(folder, config, []):
        pass
    assert call_main(f"resume={folder}") == 2
    assert not (folder / ".hydra").exists(), "the folder was written before it was looked at"
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["__class__.polluted", "__doc__", "aggregate_train", "strategy.x", "summary"])
def test_strategys_state_can_not_reach_its_class(name):
    strategy = FedAvg()
    values, arrays = checkpoint.strategy_state(strategy)
    with pytest.raises((SettingsError, KeyError)):
        checkpoint.restore_strategy(strategy, values | {name: {"kind": "value", "value": 1}}, arrays)


@pytest.mark.parametrize(
    "name", often(["a'b", 'a"b', "a\\", "a${b}", "a b(1)", "größe=1", "a,b", "[a]", "1"], "a\\", "größe=1", "a,b")
)
def test_folder_names_that_mean_something_to_hydra_are_resumed_or_answered_in_one_line(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    write_settings(Path(name))
    assert call_main(f"resume={name}", "dry_run=true") in (0, 2)
    assert capsys.readouterr().err.count("\n") <= 1
    if "${" in name:  # Hydra itself cannot log there
        return
    assert call_main(*shlex.split(to_type("resume", name)), "dry_run=true") == 0
    assert str(Path(name).resolve()) in capsys.readouterr().out
    assert os.listdir() == [name], "another folder was made"


def test_superlink_goes_on_only_with_runs_below_its_outputs(tmp_path):
    somebodys = tmp_path / "somebodys"
    somebodys.mkdir()
    with pytest.raises(SettingsError, match="on a SuperLink only runs below"):
        app.run_folder(tmp_path / "outputs", str(somebodys))
    inside = tmp_path / "outputs" / "run"
    inside.mkdir(parents=True)
    with pytest.raises(SettingsError, match="not the folder of a run"):
        app.run_folder(tmp_path / "outputs", str(inside))
    write_settings(inside)
    assert app.run_folder(tmp_path / "outputs", str(inside)) == inside
    assert app.run_folder(tmp_path / "outputs", None).parent.parent == tmp_path / "outputs"


def test_run_folder_holds_no_pickle(whole_run):
    _, folder = whole_run
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".jinja", ".md", ".png", ".log", ".yaml"}


# --- replies --------------------------------------------------------------------------------------


def forge(partition, number, reply, rng):
    """One of the ways in which a reply can be bad."""
    record = reply.content["arrays"]
    name = rng.choice(list(record))
    arrays = {key: array.numpy() for key, array in record.items()}
    kind = rng.randrange(9)
    if kind == 0:
        return lost(reply)
    if kind == 1:
        del arrays[name]
    elif kind == 2:
        arrays["more"] = np.zeros(3, np.float32)
    elif kind == 3:
        arrays[name] = arrays[name].T.copy() if arrays[name].shape[0] != arrays[name].shape[1] else arrays[name][:1]
    elif kind == 4:
        arrays[name] = arrays[name].astype(np.float64)
    elif kind == 5:
        arrays[name] = arrays[name].copy()
        arrays[name].flat[rng.randrange(arrays[name].size)] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind == 6:
        reply.content["metrics"]["num-examples"] = rng.choice([0, -5, 10**9, float("nan")])
    elif kind == 7:
        arrays = {key: value + np.float32(50) for key, value in arrays.items()}
    else:
        del reply.content["metrics"]["train_loss"]
    reply.content["arrays"] = to_record(arrays)
    return reply


def lost(reply):
    reply.content["arrays"].clear()
    return reply


def test_bad_replies_leave_the_adapter_that_the_good_ones_make(tmp_path):
    """30% of the replies of 30 rounds are bad in random ways; the result is the average of the others, by hand."""
    rng = random.Random(0)
    bad: dict[int, set] = {}

    def sometimes(partition, number, reply):
        if rng.random() < 0.3:
            bad.setdefault(number, set()).add(partition)
            return forge(partition, number, reply, rng)
        return reply

    config = small("num_rounds=30", "num_clients=8", "strategy.fraction_fit=1.0", "strategy.min_replies=3")
    clients = Clients(config, sometimes)
    federation = play(config, tmp_path, clients)
    records = federation.progress.rounds
    assert sum(map(len, bad.values())) > 50
    assert all(record["retries"] == 0 for record in records)
    for record in records:
        assert set(record["dropped"]) == bad.get(record["round"], set())
    final = clients.good[30]
    kept = [partition for partition in final if partition not in bad.get(30, set())]
    weight = sum(10 + partition for partition in kept)
    for name, value in federation.record.state.adapter.items():
        by_hand = sum((10 + p) * final[p][name].astype(np.float64) for p in kept) / weight
        np.testing.assert_allclose(value, by_hand, atol=1e-6)
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert all(reason for line in lines for reason in line["dropped"].values())
    assert sum(len(line["dropped"]) for line in lines) == sum(map(len, bad.values()))


@pytest.mark.parametrize("name", often(STRATEGIES, "FedAvg", "a strategy around another"))
def test_guard_works_with_every_strategy(name, tmp_path):
    def bad(partition, number, reply):
        return lost(reply) if partition == 1 else reply

    config = small(*SIX, *STRATEGIES[name], "strategy.fraction_fit=1.0", "num_rounds=2")
    if name == "a strategy around another":
        config.strategy["num_sampled_clients"] = 7
    federation = play(config, tmp_path, Clients(config, bad))
    assert {tuple(record["dropped"]) for record in federation.progress.rounds} == {(1,)}
    assert all(np.isfinite(value).all() for value in federation.record.state.adapter.values())


@pytest.mark.parametrize(
    ("norms", "most", "dropped"),
    [
        ({1: 1.0, 2: 9.9}, 10.0, []),
        ({1: 1.0, 2: 10.1}, 10.0, [2]),
        ({1: 1.0, 2: 1e30}, None, []),
        ({1: 5.0}, 2.0, []),
        ({1: 1.0, 2: 1.1, 3: 0.9, 4: 99.0, 5: 88.0}, 3.0, [4, 5]),
        ({1: 0.0, 2: 0.0, 3: 1.0}, 3.0, []),  # updates of nothing do not count
        ({}, 3.0, []),
    ],
)
def test_update_is_too_large_when_its_norm_is_far_above_the_median(norms, most, dropped):
    assert list(outliers(norms, [], most)) == dropped


def test_earlier_rounds_say_what_is_ordinary_too():
    assert list(outliers({1: 0.0, 2: 1e6}, [1.0, 1.1, 0.9], 10.0)) == [2]  # its partner sends no update at all
    assert list(outliers({1: 1e-7, 2: 1.0}, [1.0, 1.1, 0.9], 10.0)) == []  # or a tiny one
    assert list(outliers({1: 3e38}, [1.0], 10.0)) == [1]


def test_too_few_good_replies_ask_other_clients(tmp_path):
    def bad(partition, number, reply):
        return lost(reply) if number == 2 and partition < 6 else reply

    config = small(*SIX, "strategy.min_replies=2", "strategy.round_retries=5", "num_rounds=3")
    clients = Clients(config, bad)
    federation = play(config, tmp_path, clients)
    second = federation.progress.rounds[1]
    assert second["retries"] > 0
    assert set(second["clients"]) == {6, 7}
    assert set(second["dropped"]) == set(clients.good[2]) - {6, 7}
    assert federation.progress.rounds[2]["retries"] == 0


class Leaving(LocalGrid):
    """A grid from which a client leaves after it has answered in round 2, or comes back under another id."""

    def __init__(self, app, num_clients, new_id):
        super().__init__(app, num_clients)
        self.new_id, self.left = new_id, False

    def push_messages(self, messages):
        names = super().push_messages(messages)
        if not self.left and 2 in self.app.good:
            partition = next(iter(self.app.good[2]))
            node = next(node for node, known in self.nodes.items() if known == partition)
            del self.nodes[node]
            if self.new_id:
                self.nodes[self.new_id] = partition
            self.left = True
        return names


@pytest.mark.parametrize("new_id", [0, 5])
def test_client_that_leaves_before_a_retry_has_answered_all_the_same(new_id, tmp_path):
    def bad(partition, number, reply):
        return lost(reply) if number == 2 and partition != next(iter(clients.good[2])) else reply

    config = small(*SIX, "strategy.min_replies=2", "strategy.round_retries=1", "num_rounds=3")
    clients = Clients(config, bad)
    federation = make_federation(config, tmp_path)
    with pytest.raises(RunError, match="round 2: 1 valid reply"):
        federation.run(Leaving(clients, 8, new_id))


@pytest.mark.parametrize(
    "facts", [{}, {"partition-id": "x", "num-rows": 3, "device": ""}, {"partition-id": 0, "num-rows": -1, "device": ""}]
)
def test_newcomer_that_can_not_say_who_it_is_ends_no_run(facts, tmp_path):
    config = small(*SIX, "num_rounds=3")
    clients = Clients(config)

    class Newcomer(LocalGrid):
        def get_node_ids(self):
            return [*self.nodes, 99] if 2 in clients.good else list(self.nodes)

        def answer(self, message):
            if message.metadata.dst_node_id != 99:
                return super().answer(message)
            message.metadata.__dict__["_message_id"] = "newcomer"
            self.replies["newcomer"] = Message(RecordDict({"client": ConfigRecord(facts)}), reply_to=message)
            return "newcomer"

    federation = make_federation(config, tmp_path)
    federation.run(Newcomer(clients, 8))
    assert federation.progress.warnings == [w for w in federation.progress.warnings if "who it is" in w]
    assert len(federation.progress.warnings) == 1


def test_run_below_its_quorum_ends_and_keeps_the_rounds_before(tmp_path):
    def bad(partition, number, reply):
        return lost(reply) if number == 4 and partition != 7 else reply

    config = small(*SIX, "strategy.min_replies=2", "strategy.round_retries=1", "train.save_every_round=5")
    with pytest.raises(RunError, match=r"round 4: .*strategy.min_replies=2; client \d says"):
        play(config, tmp_path, Clients(config, bad))
    assert runfolder.rounds_in(tmp_path) == [3]
    play(config, tmp_path, resumes=True)
    play(config, tmp_path / "whole")
    assert outcome(tmp_path) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("alike", [True, False])
def test_what_every_client_wants_changed_ends_the_run_after_one_try(alike, tmp_path):
    class Refusing(Clients):
        asked = 0

        def __call__(self, message, context):
            if message.metadata.message_type != "train":
                return super().__call__(message, context)
            self.asked += 1
            reason = "model.name=x: its weights are damaged" if alike else f"its own disk {self.asked} is full"
            return Message(Error(SETTINGS_ERROR, reason), reply_to=message)

    config = small(*SIX, "strategy.round_retries=2")
    clients = Refusing(config)
    with pytest.raises(SettingsError if alike else RunError) as raised:
        play(config, tmp_path, clients)
    assert clients.asked == config.clients_per_round * (1 if alike else 3)
    assert ("\n" in str(raised.value)) == (not alike)
    assert str(raised.value).startswith("model.name=x: its weights" if alike else "round 1: not one valid reply")


def test_client_that_is_downloading_is_waited_for_and_named(tmp_path):
    class Downloading(Clients):
        asked = 0

        def __call__(self, message, context):
            reply = super().__call__(message, context)
            if message.metadata.message_type.startswith("query") and context.node_config["partition-id"] == 3:
                self.asked += 1
                if self.asked < 4:
                    reply.content["client"]["loading"] = "openlm-research/open_llama_7b_v2"
            return reply

    config = small(*SIX)
    federation = make_federation(config, tmp_path)
    said = []
    federation.progress.say = said.append
    clients = Downloading(config)
    federation.run(LocalGrid(clients, 8))
    assert clients.asked == 4
    assert said.count("1 of 8 clients are downloading openlm-research/open_llama_7b_v2") == 1


def test_strategy_that_can_not_aggregate_is_named(tmp_path):
    config = small(*SIX, "strategy._target_=flwr.serverapp.strategy.Bulyan", "strategy.num_malicious_nodes=2")
    with pytest.raises(RunError, match="round 1: Bulyan (cannot aggregate|made no adapter of) 4 replies"):
        play(config, tmp_path)


# --- clients --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_client_that_fails_midway_leaves_nothing_for_the_next(tmp_path, monkeypatch):
    """Its half of a step, gradients included, must not reach the client that the same worker serves next."""
    config = small("strategy.fraction_fit=1.0", "num_rounds=1", "model.lora.lora_dropout=0.1")
    _, plain = run_locally(config, tmp_path / "plain")
    original, failed = training.train_on, []

    def train_on(trainer, rows, task, seed):
        step = trainer.training_step
        calls = iter(range(100))

        def breaking(*arguments, **others):
            if next(calls) == 3 and not failed:
                failed.append(True)
                raise ZeroDivisionError("midway")
            return step(*arguments, **others)

        monkeypatch.setattr(trainer, "training_step", breaking)
        try:
            return original(trainer, rows, task, seed)
        finally:
            monkeypatch.setattr(trainer, "training_step", step)

    monkeypatch.setattr(client, "train_on", train_on)
    one = small("strategy.fraction_fit=1.0", "num_rounds=1", "model.lora.lora_dropout=0.1", "strategy.min_replies=4")
    federation, summary = run_locally(one, tmp_path / "failing")
    assert federation.progress.rounds[0]["retries"] == 1
    assert summary["adapter_sha256"] == plain["adapter_sha256"]


def test_gpu_out_of_memory_is_named_with_what_helps_most_first(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(client, "fine_tune", full)
    with pytest.raises(RunError) as raised:
        run_locally(small("client_resources.num_gpus=0.5", "strategy.round_retries=0"), tmp_path)
    last = str(raised.value).strip().splitlines()[-1]
    assert last.startswith("RuntimeError: out of GPU memory (CUDA out of memory)")
    saved = [part.split("=")[0] for part in last.partition("helps: ")[2].split(", ")]
    assert {"client_resources.num_gpus", "train.micro_batch_size", "model.quantization"} <= set(saved)


# --- data -----------------------------------------------------------------------------------------


def test_rows_of_all_kinds_are_trained_on_and_counted(tmp_path):
    """One row of a megabyte, emoji, right-to-left text, markers inside a row, and clients with one row each."""
    outputs = ["long " * 200_000, "🙂 family: 👩‍👩‍👧", "\u202eשלום\u202c مرحبا", "</s>### Response:\n</s>", "", "   "]
    rows = [{"instruction": "Say it.", "input": "", "output": output} for output in outputs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small(f"dataset.name={tmp_path / 'rows.jsonl'}", "num_clients=6", "strategy.fraction_fit=1.0")
    federation, summary = run_locally(config, tmp_path / "run")
    first = federation.progress.rounds[0]
    assert (len(first["clients"]), first["cut"]) == (4, 1)
    assert all("none of its 1 rows has a response" in reason for reason in first["dropped"].values())
    assert len(first["dropped"]) == 2
    assert np.isfinite(summary["final_train_loss"])


def test_text_that_is_not_utf8_is_refused_by_line(tmp_path):
    row = json.dumps({"instruction": "x", "input": "", "output": "café"}, ensure_ascii=False)
    (tmp_path / "latin.jsonl").write_bytes(b"\n".join([row.encode(), row.encode("latin-1"), row.encode()]))
    with pytest.raises(SettingsError, match=r"latin.jsonl line 2 is not UTF-8 text"):
        load_rows(small(f"dataset.name={tmp_path / 'latin.jsonl'}").dataset)


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def files_limited_to(count: int):
    """Writing beyond `count` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("count", often([700, 2000, 30_000], 2000))
def test_full_disk_ends_the_run_in_one_line_and_it_goes_on_afterwards(count, tmp_path):
    config = small(*SIX)
    play(config, tmp_path / "whole")
    with (
        files_limited_to(count),
        pytest.raises(RunError, match=r"results cannot be written \(.*[Ff]ile too large") as e,
    ):
        play(config, tmp_path / "run")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run" / "results.json").exists()
    play(config, tmp_path / "run", resumes=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_folder_that_is_removed_while_running_is_not_half_made_again(tmp_path):
    folder = tmp_path / "run"

    def bad(partition, number, reply):
        if number == 4:
            shutil.rmtree(folder, ignore_errors=True)
        return reply

    config = small(*SIX)
    with pytest.raises(RunError, match="results cannot be written .*it was removed"):
        play(config, folder, Clients(config, bad))
    assert not folder.exists()


def test_folder_that_can_not_be_written_is_refused(capsys):
    assert call_main("experiment=quickstart", "hydra.run.dir=/proc/none") == 2
    said = capsys.readouterr().err
    assert "choose another folder" in said
    assert said.count("\n") == 1


# --- signals and SIGKILL, on real processes -------------------------------------------------------

SHORT = [
    "experiment=quickstart", "dataset.eval_name=null", "num_clients=4", "strategy.fraction_fit=0.5",
    "train.training_arguments.max_steps=3",
    "num_rounds=8", "train.save_every_round=3",
]  # fmt: skip


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "main.py", *arguments], cwd=SUITE, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whoever runs the tests may have ignored it
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert call_main(*SHORT, f"hydra.run.dir={folder}") == 0
    return json.loads((folder / "results.json").read_text())["adapter_sha256"]


def wait_for(run, beginning: str) -> None:
    for line in run.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"ended before {beginning}")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_first_signal_keeps_the_last_whole_round_and_says_how_to_resume(number, code, tmp_path):
    run = start(*SHORT, f"hydra.run.dir={tmp_path}")
    wait_for(run, "round 2/")
    workers = children(run.pid)
    os.killpg(run.pid, number)  # as a terminal, `timeout` and Slurm do
    output, _ = run.communicate(timeout=300)
    assert run.returncode == code, output
    assert "Traceback" not in output
    assert f"to resume: python main.py resume={tmp_path}" in output
    wait_for_end(workers)
    assert runfolder.rounds_in(tmp_path)[0] >= 2
    assert not (tmp_path / ".tokens").exists()


@pytest.mark.slow
def test_signal_at_any_moment_ends_a_run_in_8_seconds_and_leaves_no_process(tmp_path):
    rng = random.Random()
    for number in range(12):
        run, moment, sent = (
            start(*SHORT, f"hydra.run.dir={tmp_path / str(number)}"),
            rng.uniform(1, 30),
            rng.choice(SIGNALS),
        )
        time.sleep(moment)
        tree, begun = children(run.pid), time.monotonic()
        os.killpg(run.pid, sent)
        output, _ = run.communicate(timeout=60)
        told = f"{sent.name} after {moment:.1f} s: {output}"
        assert run.returncode == 128 + sent, told
        assert time.monotonic() - begun < 8, told
        assert "Traceback" not in output, told
        wait_for_end(tree, 10)


@pytest.mark.slow
def test_second_signal_ends_at_once_and_leaves_no_process(tmp_path):
    """The first one comes where a round is being recorded, so it has to wait."""
    code = (
        "import sys, time, main, runs.record\n"
        "def slow(*_):\n    print('recording', flush=True)\n    time.sleep(60)\n    return None\n"
        "runs.record.utils.append_json_line = slow\n"
        "if __name__ == '__main__': sys.exit(main.main())\n"
    )
    script = tmp_path / "slow.py"
    script.write_text(code)
    run = subprocess.Popen(
        [sys.executable, str(script), *SHORT, f"hydra.run.dir={tmp_path / 'run'}"], cwd=SUITE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SUITE)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(run, "recording")
    workers = children(run.pid)
    run.send_signal(signal.SIGTERM)
    wait_for(run, "stopping as soon as this round is on disk; once more stops at once")
    time.sleep(1.5)
    second = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert run.wait(10) == 143
    assert time.monotonic() - second < 5
    run.stdout.close()
    wait_for_end(workers)


def test_signal_waits_for_what_must_not_be_torn(monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stopping, "first_s", None)
    signal.signal(signal.SIGTERM, stopping.stop)
    done = []
    try:
        with pytest.raises(stopping.Stopped) as stopped:
            hold_on(done)
        assert done
        assert stopped.value.exit_code == 143
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_signal_that_comes_in_a_callback_is_not_lost(monkeypatch):
    """Python drops what is raised there: Ctrl-C did nothing while a run was importing."""
    handler, reached = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(stopping, "first_s", None)
    monkeypatch.setattr(sys, "unraisablehook", stopping.once_more)
    signal.signal(signal.SIGTERM, stopping.stop)
    try:
        with pytest.raises(stopping.Stopped) as stopped:
            signal_in_a_callback(reached)
        assert stopped.value.exit_code == 143
        assert reached == ["dropped"]
    finally:
        signal.signal(signal.SIGTERM, handler)


def signal_in_a_callback(reached: list) -> None:
    def callback(_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # in which the handler raises
        reached.append("nothing was raised")

    watched = ModuleType("watched")
    reference = weakref.ref(watched, callback)
    del watched
    assert reference() is None
    reached.append("dropped")
    time.sleep(5)


def hold_on(done: list) -> None:
    with stopping.held(), stopping.held():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # `timeout` sends it to the process and to its group
        done.append(True)


def killed_and_resumed(folder: Path, arguments: list[str], moments: list[float]) -> str:
    """SIGKILL the whole tree after each of `moments` seconds, go on each time; the final adapter's digest."""
    for moment in moments:
        known = (folder / "settings.json").exists()
        run = start(f"resume={folder}") if known else start(*arguments, f"hydra.run.dir={folder}")
        try:
            run.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            tree = children(run.pid) | {run.pid}
            for pid in tree:
                os.kill(pid, signal.SIGKILL)
            run.communicate()
            wait_for_end(tree - {run.pid})
    known = (folder / "settings.json").exists()
    assert call_main(*([f"resume={folder}"] if known else [*arguments, f"hydra.run.dir={folder}"])) == 0
    return json.loads((folder / "results.json").read_text())["adapter_sha256"]


@pytest.mark.slow
def test_run_killed_at_three_moments_ends_with_the_adapter_of_one_that_was_not(uninterrupted, tmp_path, capsys):
    rng = random.Random()
    moments = [rng.uniform(3, 12) for _ in range(3)]
    assert killed_and_resumed(tmp_path, SHORT, moments) == uninterrupted, moments
    assert call_main(f"resume={tmp_path}") == 0
    assert "already complete, final loss" in capsys.readouterr().out


@pytest.mark.slow
def test_run_killed_at_twenty_moments_ends_the_same_each_time(tmp_path):
    measured = [
        *SHORT,
        "dataset.eval_name=quickstart/data/heldout.jsonl",
        "evaluate.every_rounds=2",
        "evaluate.answers=4",
    ]
    begun = time.monotonic()
    assert call_main(*measured, f"hydra.run.dir={tmp_path / 'whole'}") == 0
    length = time.monotonic() - begun
    expected = json.loads((tmp_path / "whole" / "results.json").read_text())["adapter_sha256"]
    rng = random.Random(0)
    for number in range(20):
        moment = rng.uniform(0, length)
        folder = tmp_path / str(number)
        assert killed_and_resumed(folder, measured, [moment]) == expected, moment
        print(f"killed after {moment:.1f} s: same adapter", flush=True)
