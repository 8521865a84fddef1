"""What the Hub really holds: the main command on the layouts of OpenLLaMA and Alpaca-GPT4, and what is refused how."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub import access
from hub import models as hub
from settings.schema import RunError, SettingsError
from tests.hub.repositories import build
from tests.hub.server import LocalHub
from utils import SUITE_FOLDER, quiet_libraries, read_json_lines

MODEL, ROWS = "openlm-research/open_llama_7b_v2", "vicgalle/alpaca-gpt4"
SHORT = [
    "num_clients=4",
    "strategy.fraction_fit=0.5",
    "train.seq_length=128",
    "client_resources.num_cpus=1",
    "client_resources.num_gpus=0",
    "train.training_arguments.max_steps=1",
    "train.training_arguments.per_device_train_batch_size=2",
    "train.micro_batch_size=2",
]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    build(root, MODEL, ROWS)
    return root


def start(script: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """A command of the suite as a user types it, with nothing of this machine's own Hugging Face settings."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=SUITE_FOLDER, env=clean | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(script: str, environment: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    process = start(script, environment, *arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def test_main_command_trains_on_what_the_hub_holds_and_asks_it_only_at_the_start(repositories, tmp_path):
    folder = tmp_path / "run"
    with LocalHub(repositories) as local:
        environment = local.environment(tmp_path / "home")
        process = start("main.py", environment, *SHORT, "num_rounds=3", f"hydra.run.dir={folder}")
        while process.poll() is None and not (folder / "metrics.jsonl").exists():
            time.sleep(0.2)
        asked_before_round_2 = len(local.requests)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert len(local.requests) == asked_before_round_2 > 0
        paths = [request.split()[1] for request in local.requests]
        assert not [path for path in paths if "telemetry" in path or "harness" in path or "discussions" in path]
        downloads = [
            request.split()[1] for request in local.requests if request.startswith("GET") and "/cdn/" in request
        ]
        assert len(downloads) == len(set(downloads))  # each file once, whatever the number of workers
    lines = read_json_lines(folder / "metrics.jsonl")
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert all(0 < line["train_loss"] < 20 for line in lines)
    saved = json.loads((folder / "peft_3/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == MODEL
    assert sorted(saved["target_modules"]) == ["q_proj", "v_proj"]


@pytest.mark.slow
def test_a_warm_cache_is_enough_when_the_hub_is_gone(repositories, tmp_path):
    folder = tmp_path / "run"
    with LocalHub(repositories) as local:
        environment = local.environment(tmp_path / "home")
        code, _, err = run("main.py", environment, *SHORT, "num_rounds=1", f"hydra.run.dir={folder}")
        assert code == 0, err
    code, out, err = run("test.py", environment, f"--peft-path={folder}", "--question=Hello?", "--max-new-tokens=3")
    assert code == 0, err
    code, out, err = run("main.py", environment, *SHORT, "num_rounds=1", "dry_run=true")
    assert code == 0, err
    assert "unknown without the network" not in out.replace("number of rows unknown without the network", "")


@pytest.mark.slow
def test_dry_run_asks_nobody(repositories, tmp_path):
    with LocalHub(repositories) as local:
        code, out, err = run("main.py", local.environment(tmp_path / "home"), *SHORT, "dry_run=true")
        assert code == 0, err
        assert "unknown without the network" in out
        assert local.requests == []


@pytest.fixture
def local(repositories, tmp_path, monkeypatch):
    """The Hub of the tests, for this process, with an empty cache."""
    with LocalHub(repositories) as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub.forget()
        yield server
        hub.forget()


def test_download_shows_how_far_it_is_where_all_else_is_quiet(local, monkeypatch, capsys):
    quiet_libraries()
    monkeypatch.setattr(access, "LINE_S", -1.0)
    hub.model_folder(MODEL, weights=True)
    shown = capsys.readouterr().err
    assert re.search(rf"downloading {MODEL}: \S+B of 1\d\.\dMB, .*B/s, \S+ left", shown), shown


def test_model_is_downloaded_once_and_then_asked_for_with_one_request(local, monkeypatch):
    folder = hub.model_folder(MODEL, weights=True)
    assert (folder / "tokenizer.model").is_file()
    assert len(list(folder.glob("pytorch_model-*.bin"))) == 2
    hub.forget()
    before = len(local.requests)
    assert hub.model_folder(MODEL, weights=True) == folder
    assert [request.split("?")[0] for request in local.requests[before:]] == [f"GET /api/models/{MODEL}"]
    hub.forget()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    assert hub.model_folder(MODEL, weights=True) == folder


def test_what_is_not_whole_in_the_cache_is_not_used(local, monkeypatch):
    folder = hub.model_folder(MODEL, weights=False)
    assert not list(folder.glob("*.bin"))
    hub.forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.model_folder(MODEL, weights=False) == folder
    with pytest.raises(SettingsError, match=f"not whole in the cache .*hf download {MODEL}"):
        hub.model_folder(MODEL, weights=True)


def test_absent_and_gated_models_and_an_absent_hub_get_one_line(local, repositories, monkeypatch):
    with pytest.raises(SettingsError, match="no such local folder, and no such model on the Hub"):
        hub.model_folder("openlm-research/nothing", weights=True)
    gate = repositories / "models" / MODEL / ".gated"
    gate.write_text("hf_granted")
    try:
        with pytest.raises(SettingsError, match=f"access is granted on request; ask for it at {local.url}/{MODEL}"):
            hub.model_folder(MODEL, weights=True)
    finally:
        gate.unlink()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="cannot be reached") as raised:
        hub.model_folder(MODEL, weights=True)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_download_that_breaks_for_good_ends_in_one_line_and_goes_on_the_next_time(local):
    local.break_at = 2_000_000
    with pytest.raises(RunError, match="broke off .*files that are complete are kept") as raised:
        hub.model_folder(MODEL, weights=True)
    assert "\n" not in str(raised.value)
    local.break_at = 0
    assert len(list(hub.model_folder(MODEL, weights=True).glob("pytorch_model-*.bin"))) == 2


@pytest.mark.slow
def test_every_family_trains_is_asked_and_merges(tmp_path):
    from tests.hub.families import FAMILIES, MERGED_WITHIN, try_all

    results = try_all(list(FAMILIES), tmp_path)
    assert [result["family"] for result in results] == list(FAMILIES)
    merged = {result["repository"]: result["merged"] for result in results}
    assert merged.pop("unsloth/Llama-3.2-1B-Instruct-bnb-4bit") is None  # refused: a sum needs plain weights
    assert {name: apart for name, apart in merged.items() if apart is None or apart > MERGED_WITHIN} == {}


FILES = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "is an adapter, not a base model"),
    "gguf": (["model.Q4_K_M.gguf", "README.md"], "holds only GGUF files"),
    "nothing": (["README.md"], "holds no config.json"),
    "no weights": (["config.json", "tokenizer.json"], "has no weights that transformers loads"),
    "author's own": (["config.json", "consolidated.00.pth"], "has no weights that transformers loads"),
}


@pytest.mark.parametrize("case", FILES)
def test_repository_that_is_no_base_model_is_called_what_it_is(case):
    files, message = FILES[case]
    with pytest.raises(SettingsError, match=message):
        hub.check_files("model.name=a/b", files)


def test_only_the_weights_that_transformers_reads_are_wanted():
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "model.onnx", "x.py"]
    small = ["config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    files = ["model.safetensors.index.json", *shards, *others, *small]
    wanted = hub.wanted_files("model.name=a/b", files, lambda name: index, weights=True, code=False)
    assert sorted(wanted) == sorted(["model.safetensors.index.json", *shards, *small])
    assert sorted(hub.wanted_files("k", files, lambda name: index, weights=False, code=True)) == sorted(
        [*small, "x.py"]
    )
    with pytest.raises(SettingsError, match="model-00002-of-00002.safetensors is missing"):
        hub.wanted_files("model.name=a/b", files[:2], lambda name: index, weights=True, code=False)


def test_code_of_another_repository_is_not_on_this_machine(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "own.py").touch()
    assert hub.cached_model(str(tmp_path), code=True) == tmp_path
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "a/b--own.Config"}}')
    assert hub.cached_model(str(tmp_path), code=True) is None
    assert hub.cached_model(str(tmp_path)) == tmp_path


def test_lfs_pointer_says_what_to_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(hub.LFS_POINTER + b"v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SettingsError, match="model.safetensors is a Git LFS pointer.*git lfs pull"):
        hub.check_local("m", tmp_path, weights=True)
