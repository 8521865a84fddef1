"""What the Hub really holds: the main command on the layouts of OpenLLaMA and Alpaca-GPT4, and what is refused how."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

import utils
from dataset import load_rows
from hub import access
from hub import models as hub
from settings.compose import compose
from settings.schema import RunError, SettingsError
from tests.hub.repositories import build
from tests.hub.server import LocalHub
from utils import LFS_POINTER, SUITE_FOLDER, quiet_libraries, read_json_lines

INDEX_FILE = "pytorch_model.bin.index.json"
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
    monkeypatch.setattr(utils, "LINE_S", -1.0)
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


def test_processes_that_ask_nobody_read_the_commit_that_was_found(local, monkeypatch):
    folder = hub.model_folder(MODEL, weights=True)
    newest = folder.parent.parent / "refs/main"
    newest.write_text("0" * 40)  # as if an older one had been read last
    hub.forget()
    assert hub.model_folder(MODEL, weights=True) == folder
    assert newest.read_text() == folder.name


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


def answers(status: int) -> HfHubHTTPError:
    request = httpx.Request("GET", "https://huggingface.co/api/models/a/b")
    return HfHubHTTPError(f"{status} from the Hub", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (answers(401), SettingsError, r"the Hub refuses access \(401\); log in"),
        (answers(403), SettingsError, r"the Hub refuses access \(403\); log in"),
        (answers(404), SettingsError, r"cannot be loaded from the Hub \(404 from the Hub"),
        (answers(429), RunError, "cannot be reached, or broke off .*429"),
        (answers(503), RunError, "cannot be reached, or broke off .*503"),
        (httpx.ConnectTimeout(""), RunError, r"cannot be reached, or broke off \(ConnectTimeout\)"),
        (OSError(errno.ENOSPC, "No space left on device"), RunError, "cannot be written .*No space left.*set HF_HOME"),
        (ValueError("two\nlines"), SettingsError, r"cannot be loaded from the Hub \(two lines\)"),
        (OfflineModeIsEnabled("Cannot reach it"), OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_whatever_the_hub_or_the_network_answers_is_one_line(cause, kind, message, wrapped):
    error = RuntimeError("as the Hub's client wraps it") if wrapped else cause
    error.__cause__ = cause if wrapped else None
    with pytest.raises(kind, match=message) as raised, access.refused("a/b", "model"):
        raise error
    assert "\n" not in str(raised.value)


def test_a_cache_that_others_filled_is_used_where_the_hub_is_busy_or_gone(local, monkeypatch, caplog):
    files = [Path(hf_hub_download(MODEL, name)) for name in ("config.json", "tokenizer.model", INDEX_FILE)]
    shards = [hf_hub_download(MODEL, f"pytorch_model-0000{number}-of-00002.bin") for number in (1, 2)]
    for failure in (answers(429), httpx.ConnectError("nobody is there")):
        with monkeypatch.context() as broken:
            broken.setattr(access.HfApi, "repo_info", Mock(side_effect=failure))
            hub.forget()
            assert hub.model_folder(MODEL, weights=True) == files[0].parent
            assert "what the cache holds is used as it is: model.name=" in caplog.text
    Path(shards[1]).unlink()
    with monkeypatch.context() as broken:
        broken.setattr(access.HfApi, "repo_info", Mock(side_effect=answers(429)))
        hub.forget()
        with pytest.raises(RunError, match="cannot be reached"):
            hub.model_folder(MODEL, weights=True)
    assert hub.model_folder(MODEL, weights=True) == files[0].parent  # asked again, and whole again
    assert Path(shards[1]).is_file()


def test_rows_that_were_read_are_read_again_when_the_hub_is_gone(local, monkeypatch, tmp_path):
    for name, value in {"HF_ENDPOINT": local.url, "HF_DATASETS_CACHE": tmp_path / "rows"}.items():
        monkeypatch.setattr(f"datasets.config.{name}", value)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    cfg, gone = compose([f"dataset.name={ROWS}"]).dataset, Mock(side_effect=answers(503))
    with monkeypatch.context() as broken:
        broken.setattr(access.HfApi, "repo_info", gone)
        with pytest.raises(RunError, match=f"dataset.name={ROWS}: .*cannot be reached"):
            load_rows(cfg)
    rows = load_rows(cfg).table[:]
    hub.forget()
    before = len(local.requests)
    with monkeypatch.context() as broken:
        broken.setattr(access.HfApi, "repo_info", gone)
        assert load_rows(cfg).table[:] == rows
    assert len(rows["output"]) > 50
    assert len(local.requests) == before


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
    "no-weights": (["config.json", "tokenizer.json"], "has no weights that transformers loads"),
    "of-the-author": (["config.json", "consolidated.00.pth"], "has no weights that transformers loads"),
    "gguf-weights": (["config.json", "model.gguf"], r"has no weights that transformers loads: .*only GGUF files"),
}


def write(folder: Path, *names: str, content: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("place", ["here", "Hub"])
def test_repository_that_is_no_base_model_is_called_what_it_is(case, place, local, repositories, tmp_path):
    files, message = FILES[case]
    name = str(tmp_path / "model") if place == "here" else f"tests/{case}"
    write(tmp_path / "model" if place == "here" else repositories / "models" / name, *files)
    with pytest.raises(SettingsError, match=f"model.name={name}: {message}"):
        hub.model_folder(name, weights=True)


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})


def test_only_what_transformers_reads_is_downloaded(local, repositories):
    repository = repositories / "models/tests/many-files"
    small = {"config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "model.safetensors.index.json"}
    small |= {"additional_chat_templates/rag.jinja"}
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "model.onnx", "x.py"]
    write(repository, *small, *SHARDS, *others, "adapter_config.json", "onnx/config.json", "README.md")
    write(repository, "model.safetensors.index.json", content=INDEX)

    def downloaded(**asked: bool) -> set[str]:
        return set(hub.files_in(hub.model_folder("tests/many-files", **asked)))

    assert downloaded(weights=False) == small
    assert downloaded(weights=True) == {*small, *SHARDS}
    assert downloaded(weights=False, code=True) == {*small, *SHARDS, "x.py"}


@pytest.mark.parametrize(
    ("index", "message"), [(INDEX, f"{SHARDS[1]} is missing"), ("{}", "index.json is damaged"), ("[", "is damaged")]
)
def test_weights_that_are_not_whole_are_refused(index, message, tmp_path):
    write(tmp_path, "config.json", SHARDS[0])
    write(tmp_path, "model.safetensors.index.json", content=index)
    with pytest.raises(SettingsError, match=message):
        hub.model_folder(str(tmp_path), weights=True)


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
    (tmp_path / "model.safetensors").write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SettingsError, match="model.safetensors is a Git LFS pointer.*git lfs pull"):
        hub.model_folder(str(tmp_path), weights=True)
