"""Settings: the promised commands compose and mean what they say; everything else gets one clear line."""

import dataclasses
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from learning import training
from machine import gpus
from server import engine, plan
from settings.compose import compose
from settings.overrides import canonical, parsed, to_type
from settings.schema import CONFIG_FOLDER, SamplingConfig, SettingsError
from tests.federation import call_main, often, small

SUITE = Path(__file__).parent.parent
OPEN_LLAMA_3B = "model.name=openlm-research/open_llama_3b_v2"


def test_defaults_are_the_ones_that_users_rely_on():
    config = compose()
    assert (config.num_clients, config.num_rounds, config.clients_per_round) == (20, 100, 2)
    assert (config.model.name, config.model.quantization) == ("openlm-research/open_llama_7b_v2", "4")
    assert config.model.lora == {
        "r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.075,
        "target_modules": None,  # the attention projections: tests/test_model.py
    }
    assert (config.train.learning_rate_max, config.train.learning_rate_min) == (5e-5, 1e-6)
    assert (config.train.seq_length, config.train.save_every_round, config.batch_size) == (512, 5, 16)
    arguments = config.train.training_arguments
    assert arguments["max_steps"] == 10
    assert arguments["gradient_checkpointing"] == "auto"
    assert (config.sampling.fraction_fit, config.sampling.fraction_evaluate) == (0.1, 0.0)
    assert (config.client_resources.num_cpus, config.client_resources.num_gpus) == (8, 1.0)
    assert config.dataset.name == "vicgalle/alpaca-gpt4"


@pytest.mark.parametrize("spelling", ["strategy.fraction_fit", "fraction_fit.fraction_fit"])
def test_both_spellings_of_fraction_fit_are_one_setting(spelling):
    config = compose(["num_rounds=50", f"{spelling}=0.25"])
    assert (config.num_rounds, config.sampling.fraction_fit, config.clients_per_round) == (50, 0.25, 5)


def test_fraction_fit_given_by_its_other_spelling_overrides_an_experiment(tmp_path):
    assert canonical(["a=1", "fraction_fit.fraction_fit=0.3,0.5"]) == ["a=1", "strategy.fraction_fit=0.3,0.5"]


PROMISES = {
    (): dict(rounds="100, 2 of 20", steps="2000", model="open_llama_7b_v2, quantization 4"),
    (OPEN_LLAMA_3B, "model.quantization=8"): dict(rounds="100, 2 of 20", model="open_llama_3b_v2, quantization 8"),
    ("num_rounds=50", "fraction_fit.fraction_fit=0.25"): dict(rounds="50, 5 of 20", steps="2500"),
    ("num_rounds=50", "strategy.fraction_fit=0.25"): dict(rounds="50, 5 of 20", steps="2500"),
    (OPEN_LLAMA_3B, "model.quantization=4", "client_resources.num_gpus=0.5"): dict(workers="0.5 GPUs"),
    ("experiment=quickstart",): dict(model="quickstart/model, quantization 4", data="rows, IidPartitioner"),
}


@pytest.mark.parametrize(("overrides", "expected"), PROMISES.items(), ids=lambda value: " ".join(value))
def test_promised_command_plans_offline(overrides, expected, monkeypatch, capsys):
    def no_network(*_, **__):
        raise AssertionError("a dry run touched the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    plan.show_plan(compose(overrides), Path("results-folder"))
    printed = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    names = {"steps": "optimizer steps", "model": "base model"}
    for name, text in expected.items():
        assert text in printed[names.get(name, name)]
    assert "results-folder" in printed["results"]
    known = "quickstart" in str(overrides)
    assert ("unknown" in printed["memory of a step"]) is not known


def test_dry_run_of_the_promised_sweep_plans_eight_jobs(tmp_path, capsys):
    sweep = [
        'model.name="openlm-research/open_llama_7b_v2","openlm-research/open_llama_3b_v2"',
        "model.quantization=8,4",
        "strategy.fraction_fit=0.1,0.2",
    ]
    assert call_main("--multirun", "dry_run=true", f"hydra.sweep.dir={tmp_path}", *sweep) == 0
    planned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("base model")]
    assert len(set(planned)) == 4
    assert len(planned) == 8


def test_every_experiment_and_group_composes():
    groups = {"experiment": "", "strategy": "", "dataset": "", "model": "", "dataset/partitioner": ""}
    options = [
        f"{group}={file.stem}"
        for group in groups
        for file in sorted((CONFIG_FOLDER / group).glob("*.yaml"))
        if not file.stem.startswith("_")
    ]
    assert len(options) >= 12
    for option in options:
        config = compose([option])
        plan.check_names(config)


def test_arguments_of_a_library_may_be_set_without_being_listed():
    config = compose(["model.lora.use_rslora=true", "train.training_arguments.weight_decay=0.1"])
    plan.check_names(config)
    assert config.model.lora["use_rslora"] is True
    assert training.training_arguments(config, "unused").weight_decay == 0.1


BAD = {
    "num_rouns=3": "num_rouns: there is no such setting; did you mean num_rounds",
    "num_rounds=0": "num_rounds=0: use a whole number of at least 1",
    "num_rounds=-5": "num_rounds=-5: use a whole number of at least 1",
    "num_rounds=abc": "num_rounds=abc: use a whole number",
    "num_rounds=1.5": "num_rounds=1.5: use a whole number",
    "num_rounds=null": "num_rounds=null: needs a value",
    "num_clients=0": "num_clients=0: use a whole number of at least 1",
    "seed=-1": "seed=-1: use a whole number of at least 0",
    "dry_run=maybe": "dry_run=maybe: use true or false",
    "model.quantization=3": "model.quantization=3: use one of 4, 8, none",
    "model.nam=x": "model.nam: there is no such setting; did you mean model.name",
    "model.lora.rank=8": "model.lora.rank=8: LoraConfig has no such field",
    "model.lora.r=0": "model.lora.r=0: use a whole number of at least 1",
    "model.lora.r=many": "model.lora.r=many: use a number",
    "model.lora.lora_dropout=1.5": "model.lora.lora_dropout=1.5: use a number of at least 0 and below 1",
    "model.lora.init_lora_weights=pissa": "model.lora.init_lora_weights=pissa: use one of True, gaussian",
    "train.learning_rate_max=0": "train.learning_rate_max=0: use a number above 0",
    "train.learning_rate_min=0.5": "train.learning_rate_min=0.5: use at most train.learning_rate_max",
    "train.seq_length=4": "train.seq_length=4: use a whole number of at least 16",
    "train.micro_batch_size=5": "train.micro_batch_size=5: use a divisor of the 16 rows",
    "train.save_every_round=0": "train.save_every_round=0: use a whole number of at least 1",
    "train.training_arguments.max_steps=0": "train.training_arguments.max_steps=0: use a whole number",
    "train.training_arguments.learning_rate=1": "train.training_arguments.learning_rate=1: decided by this suite",
    "train.training_arguments.maxsteps=1": "train.training_arguments.maxsteps=1: SFTConfig has no such field; did you",
    "train.training_arguments.optim=sgdd": "train.training_arguments: sgdd is not a valid Opt",
    "strategy.fraction_fit=0": "strategy.fraction_fit=0: use a number above 0",
    "strategy.fraction_fit=1.5": "strategy.fraction_fit=1.5: use a number above 0 and at most 1",
    "strategy.fraction_fit=0.01": "strategy.fraction_fit=0.01: selects none of num_clients=20; use at least 0.05",
    "fraction_fit.fraction_fit=x": "strategy.fraction_fit=x: use a number",
    "strategy._target_=flwr.NoSuch": "strategy._target_=flwr.NoSuch: there is no such class",
    "strategy._target_=builtins.dict": "strategy._target_=builtins.dict: not a message-based Flower strategy",
    "strategy.momentum=0.9": "strategy.momentum=0.9: FedAvg has no such field",
    "strategy.fraction_train=0.5": "strategy.fraction_train=0.5: decided by this suite; set strategy.fraction_fit",
    "strategy=nosuch": "strategy=nosuch: use one of: fedadam fedavg fedavgm",
    "experiment=nosuch": "experiment=nosuch: use one of: baselines quickstart",
    "dataset.template=nosuch": "dataset.template=nosuch: use alpaca, vicuna_v1.1, tokenizer",
    "dataset.partitioner._target_=x.Y": "dataset.partitioner._target_=x.Y: there is no such class",
    "dataset.partitioner.alpha=1": "dataset.partitioner.alpha=1: IidPartitioner has no such field",
    "dataset.holdout=0.9": "dataset.holdout=0.9: use a number of at least 0 and at most 0.5",
    "client_resources.num_cpus=0": "client_resources.num_cpus=0: use a whole number of at least 1",
    "+foo=1": "foo: there is no such setting",
    "+train.lr=3": "train.lr: there is no such setting",
    "strategy=null": "a group of settings cannot be null: name one",
    "model.lora=null": "model.lora=null: holds several settings",
    "train.training_arguments=null": "train.training_arguments=null: holds several settings",
    "model.lora.lora_dropout=null": "model.lora.lora_dropout=None: use a number",
    "model.lora.inference_mode=true": "model.lora.inference_mode=True: decided by this suite",
    "train.training_arguments.max_grad_norm=abc": "train.training_arguments.max_grad_norm=abc: use a number",
    "train.training_arguments.warmup_steps=5": "train.training_arguments.warmup_steps=5: has no effect",
    "strategy.fraction_evaluate=0.01": "strategy.fraction_evaluate=0.01: selects none of num_clients=20",
    "strategy._target_=flwr.serverapp.strategy.DifferentialPrivacyClientSideFixedClipping": "use its server-side twin",
    "num_rounds=[1": "num_rounds=[1: Hydra cannot read this",
    "num_rounds=true": "num_rounds=True: use a whole number",
    "num_rounds=3.0": "num_rounds=3.0: use a whole number",
    "strategy.fraction_fit=true": "strategy.fraction_fit=True: use a number",
    "train.keep_checkpoints=0": "train.keep_checkpoints=0: use a whole number of at least 1, or null",
    "transfer=zip": "transfer=zip: use one of fp32, fp16, int8",
    "tracker=excel": "tracker=excel: use one of tensorboard, wandb, ",
    "train=null": "train=null: holds several settings; set them one by one, as train.KEY=VALUE",
    "model.name=[x]": "model.name=['x']: use text; where it holds brackets",
    "hydra.run.dir=[x]": "hydra.run.dir=['x']: use text; where it holds brackets",
    "~num_rounds": "num_rounds: needs a value",
    "~strategy.fraction_fit": "strategy.fraction_fit=null: needs a value",
    "größe=1": "größe: there is no such setting",
    "dataset.split": "dataset.split: is not KEY=VALUE",
}


@pytest.mark.parametrize(("override", "expected"), BAD.items(), ids=BAD)
def test_wrong_setting_gets_one_clear_line(override, expected):
    with pytest.raises(SettingsError) as raised:
        plan.check_names(compose([override]))
    message = str(raised.value)
    assert expected in message
    assert "\n" not in message
    assert len(message) < 400


BAD_COMMANDS = {
    "client_resources.num_cpus=999": "client_resources.num_cpus=999: this machine has",
    "model.name=/no/such/model": "model.name=/no/such/model: there is no such local folder",
    "hydra.run.dir=/dev/null/x": "/dev/null/x",
    "nosuch=1": "nosuch: there is no such setting",
}


@pytest.mark.parametrize("override", often(BAD_COMMANDS, "nosuch=1", "hydra.run.dir=/dev/null/x"))
def test_command_line_ends_with_one_line_and_exit_code_2(override, tmp_path, capfd):
    folder = [] if "run.dir" in override else [f"hydra.run.dir={tmp_path}"]
    assert call_main("experiment=quickstart", override, *folder) == 2
    printed = capfd.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert BAD_COMMANDS[override] in lines[0]


def test_command_line_as_a_process_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "main.py", "client_resources.num_cpus=999", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=SUITE, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert re.match(r"error: client_resources.num_cpus=999.*: this machine has \d+ CPU cores", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr in (tmp_path / "error.txt").read_text().join(["error: ", ""])


@pytest.mark.parametrize("name", ["/data/my rows(1).jsonl", "größe=1.jsonl", "データ.jsonl", "a#b&c;d", "[x", "it's"])
def test_value_that_hydra_cannot_read_is_said_how_to_quote(name):
    """What the message tells people to type, a shell and Hydra turn into what they meant."""
    with pytest.raises(
        SettingsError, match="Hydra cannot read this; .* needs quotes, for the shell and for Hydra: "
    ) as e:
        compose([f"dataset.name={name}"])
    [typed] = shlex.split(str(e.value).split("for Hydra: ")[1])
    assert compose([typed]).dataset.name == name


TEXTS = st.text("ab/\\\"'$ {}()[],=:~#ö本\t1.-+*&", max_size=8)


VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("k"), inner),
    max_leaves=4,
)


@given(VALUES)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_written_values_are_read_back_by_hydra(value):
    [text] = shlex.split(to_type("key", value))
    read = OmegaConf.create({"key": parsed(text).value()})
    assert OmegaConf.to_container(read, resolve=True)["key"] == value


def test_more_clients_than_rows_is_refused():
    with pytest.raises(SettingsError, match="num_clients=9999: more clients than the 2002 rows|num_clients=9999: more"):
        plan.check_inputs(small("num_clients=9999"))


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-that-name/x"])
def test_names_that_can_be_no_path_are_refused_as_names(name):
    with pytest.raises(SettingsError, match="dataset.name="):
        plan.check_inputs(small(f"dataset.name={name}"))


def test_broken_template_is_refused_before_the_start(tmp_path):
    (tmp_path / "broken.jinja").write_text("{% if %}")
    with pytest.raises(SettingsError, match="dataset.template="):
        plan.check_inputs(small(f"dataset.template={tmp_path / 'broken.jinja'}"))


def test_missing_gpu_is_said_with_the_way_out(monkeypatch):
    monkeypatch.setattr(gpus, "cards", list)
    monkeypatch.setattr(gpus, "given", lambda: None)
    with pytest.raises(
        SettingsError, match=r"client_resources.num_gpus=1: this machine has no GPU; set client_resources.num_gpus=0 "
    ):
        engine.check_machine(small("client_resources.num_gpus=1"))


def test_sampling_keys_all_have_a_default():
    assert {entry.name for entry in dataclasses.fields(SamplingConfig)} <= set(compose().strategy)
