"""Deployment: real SuperLinks and nodes on loopback, started by the launchers; and what a node refuses."""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.common.serde import user_config_from_proto

import app
import client
from dataset import load_rows
from deployment import bundle, certificates, connection, launchers, limits, link, resident, submission
from deployment.acceptance import accepted
from deployment.node import Node, Tally, log
from deployment.work import answered
from exchange.faults import SETTINGS_ERROR, failure_of
from exchange.transfer import to_record
from learning import training
from learning.evaluation import HeldOut
from settings.compose import compose
from settings.policy import check_adapter, read_policy
from settings.schema import RunError, SettingsError
from tests.federation import children, identify_as_flower_task
from tests.test_house import modules
from utils import SUITE_FOLDER, file_sha256, printable, read_json_lines

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


QUICKSTART = [
    "experiment=quickstart",
    "dataset.eval_name=null",
    "num_rounds=4",
    "train.training_arguments.max_steps=40",
]
RUN = ["experiment=quickstart", "evaluate.answers=16", "num_rounds=3", "train.training_arguments.max_steps=2"]
POLLING_S = 4.0  # the node asks for messages, and the server for replies


# --- what a node accepts, and what the launchers refuse -------------------------------------------

PRIVATE = {"partition-id": 0}


def test_flower_finds_the_apps_that_the_project_names():
    config, _ = load_and_validate(SUITE_FOLDER / "pyproject.toml")  # as `flwr run` and `flwr build` do
    assert config["tool"]["flwr"]["app"]["components"] == {"serverapp": "app:server", "clientapp": "app:client"}


@pytest.mark.slow
def test_bundle_for_flower_holds_all_that_an_app_imports(tmp_path):
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(SUITE_FOLDER))) as bundle:
        bundle.extractall(tmp_path)
    own = sorted(file.relative_to(SUITE_FOLDER) for file in modules().values())
    assert not [file for file in own if not (tmp_path / file).is_file()]
    code = "import app, sys, server.federation, client; print(*{m.__file__ for m in map(sys.modules.get, %r) if m})"
    command = [sys.executable, "-c", code % list(modules())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) > 20
    assert all(Path(file).is_relative_to(tmp_path) for file in files)


DEFAULT = read_policy()


def test_node_uses_its_own_rows_and_ignores_the_servers_data(tmp_path):
    own = tmp_path / "own.jsonl"
    config, own_rows = accepted("experiment=quickstart", PRIVATE | {"dataset": str(own)}, DEFAULT)
    assert (config.dataset.name, own_rows) == (str(own), True)
    config, own_rows = accepted("""experiment=quickstart 'model.cache_folder="/tmp/x"'""", PRIVATE, DEFAULT)
    assert config.model.cache_folder is None  # where a node writes is its own business too
    assert (config.dataset.name, own_rows) == (str(SUITE_FOLDER / "quickstart/data/train.jsonl"), False)


def test_server_learns_no_value_of_a_nodes_column_unless_the_node_allows_it(tmp_path):
    own = PRIVATE | {"dataset": str(tmp_path / "own.jsonl")}
    for node, column in ((own, ""), (PRIVATE | {"eval": "x"}, ""), (own | {"category-column": "ward"}, "ward")):
        config, _ = accepted("experiment=quickstart dataset.category_column=output", node, DEFAULT)
        assert config.dataset.category_column == column
    config, _ = accepted("experiment=quickstart dataset.eval_name=owner/data", PRIVATE | {"eval": "x"}, DEFAULT)
    assert config.dataset.eval_name == "x"


def test_server_does_not_choose_what_of_a_nodes_own_rows_is_trained(tmp_path):
    own = PRIVATE | {"dataset": str(tmp_path / "own.jsonl")}
    chosen = "experiment=quickstart dataset.columns={output:diagnosis} dataset.subset=some"
    for node, columns, subset in (
        (own, {}, None),
        (PRIVATE | {"eval": "x"}, {}, "some"),
        (PRIVATE, {"output": "diagnosis"}, "some"),
    ):
        config, _ = accepted(chosen, node, DEFAULT)
        assert (config.dataset.columns, config.dataset.subset) == (columns, subset)


@pytest.mark.parametrize(
    "demand",
    [
        "dataset.subset=some/folder",
        "dataset.subset=.",
        "dataset.eval_name=/etc/passwd",
        "dataset.eval_name=quickstart/data",
        "dataset.name=/etc/passwd",
        "dataset.name=../../../../../../etc/passwd",
        "dataset.name=/etc",
        "dataset.name='\"/etc/passwd\"'",
        "dataset.name=.",
        "dataset.name=\"''\"",
        "dataset.name=json",
        "dataset.name=docs",
        "dataset.name=tests/conftest.py",
        "dataset.name=quickstart/data",
        "model.name=.",
        "model.name=/etc",
        "dataset.template=/etc/passwd",
        "dataset.template=../../etc/passwd",
        "dataset.template=README.md",
        "dataset.template=${oc.env:HOME}",
        "model.name=someone/${oc.env:HOME}",
        "model=../../../etc/passwd",
        "model=/etc/passwd",
        "hydra.searchpath=[file:///etc]",
        "+train.training_arguments.push_to_hub=true",
        "+model.lora.modules_to_save=[/etc/passwd]",
        "train.training_arguments.deepspeed=/etc/passwd",
        "dataset.partitioner._target_=os.system",
        "model.trust_remote_code=true",
    ],
)
def test_server_can_not_make_a_node_open_a_path_or_run_code(demand):
    def obey():
        config, _ = accepted(f"experiment=quickstart {demand}", PRIVATE, DEFAULT)
        training.training_arguments(config, "unused")

    with pytest.raises(SettingsError) as raised:
        obey()
    assert os.environ["HOME"] not in str(raised.value)


STEPS = "train.training_arguments"


@pytest.mark.parametrize(
    ("demand", "name"),
    [
        (f"{STEPS}.max_steps=100000", "max_steps"),
        (f"{STEPS}.per_device_train_batch_size=1 train.micro_batch_size=1", "min_step_rows"),
        ("evaluate.max_new_tokens=1000000000", "max_new_tokens"),
        ("evaluate.answers=100000", "max_answers"),
        ("evaluate.answers=1", "min_held_out_rows"),
        ("model.lora.r=1000000", "max_rank"),
        ("+model.lora.rank_pattern={q_proj:1000000}", "max_rank"),
        ("+model.lora.modules_to_save=[embed_tokens]", "train_embeddings"),
        ("train.learning_rate_max=1.0", "max_learning_rate"),
        ("train.seq_length=1000000", "max_seq_length"),
        (f"{STEPS}.optim=sgd", "sgd: this node's policy allows adamw_torch"),
        (f"+{STEPS}.dataloader_num_workers=5000", "dataloader_num_workers"),
        (f"+{STEPS}.torch_compile=true", "torch_compile"),
        ("+model.lora.layer_replication=[[0,4]]", "layer_replication"),
    ],
)
def test_settings_beyond_a_nodes_policy_are_refused_by_name(demand, name):
    node = PRIVATE | {"dataset": "/srv/hospital/rows.jsonl"}
    answer = answered("describe", f"experiment=quickstart {demand}", node, RecordDict())
    assert answer.code == SETTINGS_ERROR
    assert name in answer.told
    assert demand.split("=")[0].lstrip("+").split(".")[-1] in answer.told
    assert "hospital" not in answer.told


def test_owner_may_pin_settings_and_widen_limits(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("pinned: {model.name: quickstart/model, dataset.holdout: 0.05}\nmax_steps: 100000\n")
    policy = read_policy(file)
    accepted(f"experiment=quickstart {STEPS}.max_steps=100000", PRIVATE, policy)
    with pytest.raises(SettingsError, match=r"dataset.holdout=0.1: this node's policy allows only 0.05 \(pinned\)"):
        accepted("experiment=quickstart dataset.holdout=0.1", PRIVATE, policy)
    for text, words in (("max_step: 1", "did you mean max_steps"), ("max_steps: 0", "max_steps=0: use a whole number"),
                        ("- 1", "use lines of KEY: VALUE"), ("a: [", "cannot be read")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(SettingsError, match=words):
            read_policy(file)
    file.write_text("pinned: {model.lora.target_modules: [q_proj]}")
    lora = "experiment=quickstart model.lora.target_modules"
    accepted(f"{lora}=[q_proj]", PRIVATE, read_policy(file))
    with pytest.raises(SettingsError, match=r"allows only \['q_proj'\] \(pinned\)"):
        accepted(f"{lora}=[q_proj,v_proj]", PRIVATE, read_policy(file))


@pytest.fixture
def fresh_worker():
    client._resident.clear()
    yield
    client._resident.clear()


def worker_with(*overrides: str, node=PRIVATE) -> client.Worker:
    return client.resident_worker(
        client.Site(*accepted(" ".join(["experiment=quickstart", *overrides]), node, DEFAULT))
    )


def test_embeddings_are_trained_only_where_the_owner_says_so(fresh_worker):
    named = worker_with("model.lora.target_modules=[embed_tokens,q_proj]")
    with pytest.raises(SettingsError, match=r"embed_tokens: this node's policy allows no embedding"):
        check_adapter(DEFAULT, named.plan[1])
    check_adapter(dataclasses.replace(DEFAULT, train_embeddings=True), named.plan[1])
    check_adapter(DEFAULT, worker_with().plan[1])  # all-linear
    with pytest.raises(SettingsError, match=r"down_proj: this node's policy allows q_proj, v_proj to be trained"):
        check_adapter(dataclasses.replace(DEFAULT, target_modules=["q_proj", "v_proj"]), worker_with().plan[1])


def test_app_of_a_plain_supernode_answers_within_the_same_policy(fresh_worker):
    identify_as_flower_task()
    message = Message(RecordDict(), 1, "query")
    for overrides, refuses in (
        ("experiment=quickstart", False),
        (f"experiment=quickstart {STEPS}.max_steps=9999", True),
    ):
        context = Context(1, 1, {"partition-id": 5}, RecordDict(), {"overrides": overrides})
        reply = app.client1(message, context)
        assert reply.has_error() == refuses
        if refuses:
            assert "at most 1000 (max_steps)" in reply.error.reason
        else:
            assert reply.content["client"]["partition-id"] == 0  # client1's own


def test_server_cannot_change_the_base_model_of_a_node(fresh_worker):
    node = PRIVATE | {"run-id": 1}
    settings = "experiment=quickstart model.quantization=none"
    worker = worker_with("model.quantization=none")
    sent = {name: np.zeros(shape, np.float32) for name, shape in worker.plan[1].items()}
    base = {name: value.clone() for name, value in worker.model.named_parameters() if not value.requires_grad}
    name, value = next((name, value) for name, value in base.items() if "embed_tokens" in name)
    config = {"learning-rate": 0.001, "first-row": 0, "server-round": 1, "rows": "own"}
    first = next(iter(sent))
    for arrays in (sent | {name: np.ones(value.shape, np.float32)}, sent | {first: np.zeros((1, 1), np.float32)}, {}):
        records = {"arrays": to_record(arrays), "config": ConfigRecord(config)}
        for handler in ("train", "evaluate"):
            answer = answered(handler, settings, node, RecordDict(dict(records)))
            assert answer.code == SETTINGS_ERROR
            assert "arrays=" in answer.told
    now = dict(worker.model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in base.items())


def rows_file(path: Path, count: int) -> Path:
    lines = [
        {"instruction": f"Say {n}.", "input": "", "output": f"Word {n}", "ward": f"w{n // 12}"} for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def message_config(**values) -> RecordDict:
    return RecordDict({"config": ConfigRecord(values)})


def test_few_rows_are_neither_trained_on_nor_scored(tmp_path, fresh_worker):
    few = worker_with(node=PRIVATE | {"dataset": str(rows_file(tmp_path / "few.jsonl", 7))})
    ask = message_config(**{"learning-rate": 0.001, "first-row": 0})
    with pytest.raises(SettingsError, match="rows of this node=7: this node's policy allows at least 8"):
        limits.check_training(few, DEFAULT, ask, 0)
    same = tmp_path / "same.jsonl"
    same.write_text('{"instruction": "Say hello.", "input": "", "output": "Hello, friend."}\n' * 40)
    with pytest.raises(SettingsError, match="rows of this node=1:"):
        limits.check_training(worker_with(node=PRIVATE | {"dataset": str(same)}), DEFAULT, ask, 0)
    own = PRIVATE | {"dataset": str(rows_file(tmp_path / "rows.jsonl", 40)), "category-column": "ward"}
    held = worker_with("dataset.holdout=0.03", node=own)
    limits.check_training(held, DEFAULT, ask, 0)
    for rate in (1.0, -1.0, float("nan")):
        with pytest.raises(SettingsError, match="learning-rate"):
            limits.check_training(held, DEFAULT, message_config(**{"learning-rate": rate, "first-row": 0}), 0)
    with pytest.raises(SettingsError, match=r"dataset.holdout=0.03: .* no score of fewer than 10 rows"):
        limits.check_evaluation(held, DEFAULT, message_config(rows="own"), 0)
    many = worker_with("dataset.holdout=0.5", node=own)
    limits.check_evaluation(many, DEFAULT, message_config(rows="own"), 0)
    assert set(many.held_out(0).categories) == {""}  # 20 rows of four wards: none has ten


def test_categories_of_few_rows_lose_their_names_and_few_answers_are_not_told():
    data = HeldOut([{}] * 45, [""] * 45, ["a"] * 12 + ["b"] * 11 + ["c"] * 11 + ["d"] * 11)
    assert set(limits.with_large_categories(data, 12).categories) == {"a", ""}
    data = HeldOut([{}] * 13, [""] * 13, ["a"] * 12 + ["b"])
    assert set(limits.with_large_categories(data, 12).categories) == {""}  # else the one would be what is left
    scores = MetricRecord({"a": [1.0, 2.0, 3.0, 1.0, 0.5, 4.0], "b": [1.0, 2.0, 3.0, 1.0, 0.5, 12.0]})
    told = limits.without_few_answers(RecordDict({"scores": scores}), DEFAULT)["scores"]
    assert (told["a"], told["b"]) == ([1.0, 2.0, 3.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 1.0, 0.5, 12.0])


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.csv", "What has Ann,Berg born 1950?,HIV\nWhat else?,,Nothing\n", None),  # no header
        ("rows.jsonl", '{"instruction": "a", "input": "", "output": "b"}\n{"instruction": Ann HIV}\n', 2),
        ("rows.jsonl", '{"instruction": "Ann HIV", "input": {"Berg": 1950}, "output": "b"}\n' * 9, None),
        ("rows.csv", "instruction,output\nAnn Berg,HIV,1950\n", 2),
        ("rows.jsonl", '[{"instruction": "Ann Berg", "output": "HIV"}, {"instruction": Berg 1950}]', 1),
        ("rows.jsonl", '{"instruction": "Ann Berg", "output": "HIV"\n{"instruction": "1950", "output": "b"}\n', 1),
    ],
)
def test_no_row_and_no_path_is_in_what_a_server_learns_of_a_failure(name, content, line, tmp_path, fresh_worker):
    file = tmp_path / name
    file.write_text(content)
    answer = answered("describe", "experiment=quickstart", PRIVATE | {"dataset": str(file)}, RecordDict())
    assert answer.code
    assert not [word for word in ("Ann", "Berg", "1950", "HIV", str(tmp_path), name) if word in answer.told], (
        answer.told
    )
    assert str(file) in answer.whole or name in answer.whole
    assert line is None or f"line {line}" in answer.told


def test_unexpected_failure_says_where_and_not_what():
    def quote_a_row():
        raise KeyError("Ann Berg, born 1950: HIV")

    try:
        quote_a_row()
    except KeyError as error:
        code, told, whole = failure_of(error, [])
    assert "HIV" not in told
    assert "KeyError" in told
    assert "quote_a_row (tests/test_deployment.py)" in told
    assert "HIV" in whole


def test_what_others_sent_cannot_steer_a_terminal():
    assert printable("a\x1b[2Jb\u202ec\td\n") == "a\ufffd[2Jb\ufffdc\td\n"


def test_fingerprint_tells_rows_apart_and_needs_the_nodes_key(tmp_path):
    def rows_of(*lines):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return load_rows(compose([f"dataset.name={file}"]).dataset)

    one, other = {"instruction": "ab", "input": "", "output": "c"}, {"instruction": "d", "input": "", "output": "e"}
    rows = rows_of(one, other)
    chat = [{"messages": [{"role": role, "content": text}]} for role, text in (("user", "ab"), ("assistant", "c"))]
    different = [
        rows_of(one, {"instruction": "d", "input": "e", "output": ""}),
        rows_of(one, {"instruction": "d", "input": None, "output": "e"}),
        rows_of(other, one),
        rows_of(one),
        rows_of(one, other, other),
        rows_of(*({"instruction": row["instruction"], "response": row["output"]} for row in (one, other))),
        rows_of(*chat),
    ]
    found = {limits.fingerprint(rows, b"2"), *(limits.fingerprint(each, b"1") for each in (rows, *different))}
    assert len(found) == 2 + len(different)
    beside = rows_of(one | {"ward": "a"}, other | {"ward": "b"})  # a column that no conversation is made of
    assert limits.fingerprint(beside, b"1") == limits.fingerprint(rows, b"1")


# --- a node runs its own code alone ---------------------------------------------------------------


def bundle_of(files: dict[str, bytes], **options) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def test_bundle_is_known_by_its_files_and_not_by_how_it_is_packed():
    files = {"app.py": b"1", "model.py": b"2", ".info/CONTENT": b"x"}
    own = bundle.digest(bundle_of(files))
    backwards = dict(reversed(files.items())) | {".info/CONTENT": b"y"}
    assert own == bundle.digest(bundle_of(backwards, compression=zipfile.ZIP_DEFLATED))
    for other in ({"app.py": b"3"}, {"sitecustomize.py": b""}, {"model.py": b""}):
        assert own != bundle.digest(bundle_of(files | other))
    assert bundle.own_digest() == bundle.digest(build_fab_from_disk(SUITE_FOLDER))


@pytest.mark.parametrize(
    "content", [b"", b"no archive", bundle_of({"a": b"0" * 60_000_000}, compression=zipfile.ZIP_DEFLATED)]
)
def test_what_is_no_bundle_is_refused(content):
    with pytest.raises(ValueError, match="bundle"):
        bundle.digest(content)


WORKER = """
import os, sys, time
from multiprocessing.connection import Connection
from deployment.resident import Answer
connection = Connection(int(sys.argv[-1]))
while True:
    try:
        asked = connection.recv()
    except EOFError:
        sys.exit(0)
    if asked == ("die",):
        os._exit(3)
    if asked == ("sleep",):
        time.sleep(1000)
    connection.send(Answer(os.getpid()))
"""


def test_message_that_nobody_waits_for_is_stopped_and_a_dead_worker_replaced(monkeypatch):
    monkeypatch.setattr(resident.ResidentWorker, "command", (sys.executable, "-c", WORKER))
    monkeypatch.setattr(resident, "LOOK_S", 0.05)
    monkeypatch.setattr(resident, "EARLY_S", 0.0)
    with resident.ResidentWorker(os.environ) as worker:
        first = worker.ask(("who",), 60, lambda: False).content
        with pytest.raises(resident.GivenUp, match="nobody waits"):
            worker.ask(("sleep",), 60, lambda: True)
        second = worker.ask(("who",), 60, lambda: False).content
        with pytest.raises(resident.GivenUp, match=r"after 0.2 s"):
            worker.ask(("sleep",), 0.2, lambda: False)
        third = worker.ask(("who",), 60, lambda: False).content
        with pytest.raises(resident.Died):
            worker.ask(("die",), 60, lambda: False)
        fourth = worker.ask(("who",), 60, lambda: False).content
        assert len({first, second, third, fourth}) == 4
        assert not any(Path(f"/proc/{pid}").exists() for pid in (first, second, third))
    assert not Path(f"/proc/{fourth}").exists()


def test_worker_that_cannot_start_ends_the_node(monkeypatch):
    monkeypatch.setattr(resident.ResidentWorker, "command", (sys.executable, "-c", "raise SystemExit(1)"))
    with resident.ResidentWorker(os.environ) as worker:
        for last in (False, False, True):
            worker.process.wait()
            with pytest.raises(resident.Died, match="as soon as it starts" if last else "another one"):
                worker.ask(("who",), 60, lambda: False)


def launch(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False, **options)


@pytest.mark.slow  # a claim about time, which a busy machine cannot keep
def test_absent_superlink_gets_one_clear_line_within_15_seconds():
    start, port = time.monotonic(), free_port()
    done = launch(str(BIN / "flower-server-app"), "app:server", "--insecure", f"--superlink=127.0.0.1:{port}")
    assert time.monotonic() - start < 15
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: --insecure")]
    assert len(errors) == 1
    assert f"--superlink=127.0.0.1:{port}: no SuperLink answers" in errors[0]
    assert done.stderr.startswith("warning: --insecure")


def test_node_without_a_superlink_gets_one_clear_line(monkeypatch, capsys):
    monkeypatch.setattr(connection, "REACH_S", 0.2)
    monkeypatch.setattr(launchers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["flower-client-app", "app:client1", f"--superlink=127.0.0.1:{free_port()}"])
    assert launchers.client_command() == launchers.FAILED  # nothing has to be changed but the SuperLink to be started
    assert "no SuperLink answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["flower-client-app", "app:nobody"], "use app:client, app:client1, app:client2"),
        (["flower-client-app", "app:client"], "needs --partition-id"),
        (["flower-client-app", "app:client1", "--dataset=/no/such"], "--dataset=/no/such: no such file"),
        (["flower-client-app", "app:client1", "--root-certificates=/no/such"], "no such file"),
        (["flower-client-app", "app:client1", f"--root-certificates={__file__}"], "holds no certificate"),
        (["flower-client-app", "app:client1", "--dataset=" + "x" * 300], "no such file"),
        (["flower-client-app", "app:client1", "--partition-id=3"], "app:client1 has its own; use app:client"),
        (["flower-client-app", "app:client1", "--node-config", "a=1"], "--node-config: there is no such option"),
        (["flower-server-app", "app:server", "num_rouns=2"], "num_rouns: there is no such setting; did you mean"),
        (["flower-server-app", "app:server", "num_rounds=abc"], "num_rounds=abc: use a whole number"),
        (["flower-server-app", "app:server", "--superlink=127.0.0.1:²"], "use HOST:PORT"),
        (["flower-server-app", "app:server", "--superlink=127.0.0.1:99999"], "use HOST:PORT"),
        (["flower-server-app", "app:server", "--superlink=a..b:8100"], "no SuperLink answers"),
        (["flower-server-app", "app:client1"], "use app:server"),
        (["flower-server-app", "app:server", "num_rounds"], "num_rounds: is not KEY=VALUE"),
        (["flower-server-app", "app:server", "--superlink=nowhere"], "use HOST:PORT"),
    ],
)
def test_wrong_launcher_arguments_get_one_clear_line(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(launchers.signal, "signal", lambda *_: None)
    command = {"flower-client-app": launchers.client_command, "flower-server-app": launchers.server_command}
    assert command[arguments[0]]() == (launchers.FAILED if "no SuperLink answers" in expected else launchers.WRONG)
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line


@pytest.mark.parametrize("command", ["flower-client-app", "flower-server-app"])
def test_launchers_are_installed_as_commands(command):
    done = launch(str(BIN / command), "app:nobody")
    assert done.returncode == launchers.WRONG
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "use app:" in line


def test_certificates_are_made_once_whole_or_not_at_all_and_keys_are_private(tmp_path):
    certificates.make(tmp_path, ["federation.example.org"], ["node"])
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert (tmp_path / "server.key").stat().st_mode & 0o077 == 0
    assert (tmp_path / "node").stat().st_mode & 0o077 == 0
    assert made["node.pub"].startswith(b"ecdsa-sha2-nistp384 ")
    names = x509.load_pem_x509_certificate(made["server.pem"]).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["federation.example.org", "localhost"]
    assert [str(address) for address in names.value.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    for hosts, nodes in ((["federation.example.org"], ["other"]), ([], ["other", "node"])):
        with pytest.raises(FileExistsError, match="exists: choose another folder"):
            certificates.make(tmp_path, hosts, nodes)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == made
    certificates.make(tmp_path, [], ["other"])
    assert (tmp_path / "other.pub").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
@pytest.mark.parametrize("unit", ["flower-client.service", "flower-superlink.service"])
def test_service_files_are_valid_and_hold_what_runs_in_them(unit, tmp_path):
    text = (SUITE_FOLDER / "deployment" / unit).read_text()
    here = tmp_path / unit
    here.write_text(text.replace("/opt/llm-flowertune/.venv/bin", str(BIN)))
    verified = launch("systemd-analyze", "verify", str(here))
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    exposed = launch("systemd-analyze", "security", "--offline=true", "--threshold=25", str(here))
    assert exposed.returncode == 0, exposed.stdout  # 2.5 of 10 at most
    assert str(BIN) in here.read_text()
    [words] = re.findall(r"ExecStart=((?:.*\\\n)*.*)", text)
    assert not [word for word in re.findall(r"--[a-z-]+(?==)", words) if word not in known_options(unit)]


def known_options(unit: str) -> str:
    """The --help of the command that a service file starts."""
    return launch(
        str(BIN / {"flower-client.service": "flower-client-app"}.get(unit, "flower-superlink")), "--help"
    ).stdout


OPTIONS = argparse.Namespace(superlink="127.0.0.1:1", insecure=True, root_certificates=None)


@pytest.mark.parametrize("text", ["a b", "it's", 'say "hi"', "back\\slash", "ü😀", "a,b=[1,2]"])
def test_any_text_reaches_the_run_config_as_it_is_with_the_bundle_that_nodes_compare(text):
    run, asked = submission.Run(OPTIONS), []
    run.client = SimpleNamespace(StartRun=lambda request: asked.append(request) or SimpleNamespace(run_id=7))
    run.start(text)
    [request] = asked
    assert user_config_from_proto(request.override_config) == {"overrides": text}
    assert bundle.digest(request.fab.content) == bundle.own_digest()
    assert request.fab.hash_str == hashlib.sha256(request.fab.content).hexdigest()


def test_log_is_shown_line_by_line_however_it_is_cut_and_what_it_says_is_taken_down(capsys):
    run, log = submission.Run(OPTIONS), "INFO: a\rfolder: /srv/x\nerror: \x1b[2J\nlog: /srv/x/main.log"
    pieces = [SimpleNamespace(log_output=mark) for mark in log]
    run.client = SimpleNamespace(StreamLogs=lambda request: iter(pieces))
    run.show_log()
    assert capsys.readouterr().out.splitlines() == log.replace("\x1b", "\ufffd").splitlines()
    assert (run.folder, run.gave_reason, run.says_how) == ("/srv/x", True, True)


@pytest.mark.parametrize("status", [403, 500])
def test_run_that_the_superlink_does_not_take_says_why(status):
    def refuse(request):
        raise refused(status)

    run = submission.Run(OPTIONS)
    run.client = SimpleNamespace(StartRun=refuse, ListRuns=refuse, StopRun=refuse)
    with pytest.raises(RunError, match="the SuperLink took no run: refused"):
        run.start("")
    with pytest.raises(RunError, match=r"its status is not known \(refused\)"):
        run.status()
    run.stop()


def test_folder_that_cannot_be_packed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "SUITE_FOLDER", tmp_path)
    with pytest.raises(RunError, match=r"took no run: pyproject\.toml not found"):
        submission.Run(OPTIONS).start("")


def test_run_that_a_superlink_has_forgotten_and_a_log_that_breaks_off_are_said(capsys):
    def forgotten(request):
        answer = httpx.Response(404, json={"code": 16, "detail": "Run ID not found."})
        raise httpx.HTTPStatusError("404", request=httpx.Request("POST", "http://x"), response=answer)

    run = submission.Run(OPTIONS)
    run.client = SimpleNamespace(ListRuns=forgotten, StreamLogs=forgotten)
    with pytest.raises(RunError, match=r"its status is not known \(\[code: 16\] Run ID not found"):
        run.status()
    run.show_log()
    assert "the log of run 0 cannot be read any further (404)" in capsys.readouterr().err


def test_failure_is_on_the_terminal_of_its_node_even_if_the_run_is_over(caplog, monkeypatch):
    def over(*_):
        raise link.RunOver

    identify_as_flower_task()
    asked = Message(RecordDict(), 5, "train")
    failing = Node(SimpleNamespace(identify=lambda _: None, send=over), None, {}, DEFAULT)
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(failing, "tally_of", lambda task: Tally(task.run))
    monkeypatch.setattr(failing, "answer_of", lambda task: resident.Answer(None, 1, "told", "the whole reason"))
    with pytest.raises(link.RunOver):
        failing.answer(link.Task(asked, SimpleNamespace(run_id=7), b""))
    assert "the whole reason" in caplog.text


def test_certificates_may_have_comments_in_any_language(tmp_path):
    certificates.make(tmp_path, ["localhost"], [])
    file = tmp_path / "ca.pem"
    file.write_text("# Zürich\n" + file.read_text(), encoding="utf-8")
    options = argparse.Namespace(superlink="127.0.0.1:1", insecure=False, root_certificates=file)
    assert submission.Run(options).id == 0, "none was started"
    _, insecure, sent = connection.client_of(SimpleNamespace(from_server_address=lambda *given: given[:3]), options)
    assert not insecure
    assert sent.decode("ascii").splitlines()[1:] == (file.read_text("utf-8")).splitlines()[1:]


# --- the engine, for real -------------------------------------------------------------------------


class Engine:
    """A SuperLink and nodes below one folder; every process it starts is ended by its id."""

    def __init__(self, folder: Path, tls: bool = False, port: int = 0, proxy: bool = False) -> None:
        self.folder, self.port, self.tls = folder, port or free_port(), tls
        self.door = free_port() if proxy else self.port  # where nodes come in
        home = folder / "flower"
        home.mkdir(parents=True)
        self.environment = os.environ | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        self.processes: dict[str, subprocess.Popen] = {}
        keys = folder / "keys"
        if tls:
            certificates.make(keys, ["localhost"], ["first", "second", "third"])
        self.security = ["--root-certificates", str(keys / "ca.pem")] if tls else ["--insecure"]
        connection = [f'[superlink.trial]\naddress = "127.0.0.1:{self.port}"']
        connection.append(f'root-certificates = "{keys / "ca.pem"}"' if tls else "insecure = true")
        (home / "config.toml").write_text("\n".join(connection) + "\n")
        certificate = ["--ssl-ca-certfile", keys / "ca.pem", "--ssl-certfile", keys / "server.pem"]
        certificate += ["--ssl-keyfile", keys / "server.key", "--enable-supernode-auth"]
        options = certificate if tls else ["--insecure"]
        self.start("superlink", "flower-superlink", "--port", str(self.port), *map(str, options))
        self.wait_for_superlink()
        if proxy:
            self.start("nginx", "nginx", "-p", str(folder), "-c", str(self.proxy_config()), "-g", "daemon off;")

    def proxy_config(self) -> Path:
        """The configuration that the suite ships, with this engine's ports and files."""
        server = (SUITE_FOLDER / "deployment/nginx.conf").read_text()
        for shipped, here in (("8443", self.door), ("127.0.0.1:8000", f"127.0.0.1:{self.port}"),
                              ("/etc/flower", self.folder / "keys")):  # fmt: skip
            assert shipped in server
            server = server.replace(shipped, str(here))
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {self.folder}/{kind};\n" for kind in kinds)
        file = self.folder / "nginx.conf"
        user = "user root;\n" if os.geteuid() == 0 else ""  # the folder of a test is its user's alone
        file.write_text(
            f"{user}pid {self.folder}/nginx.pid;\nevents {{}}\nhttp {{\naccess_log off;\n{temporary}{server}}}\n"
        )
        return file

    def wait_for_superlink(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError(self.log("superlink"))

    def start(self, name: str, *command: str) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.processes[name] = process
        return process

    def node(self, name: str, app: str, *options: str) -> subprocess.Popen:
        address = f"localhost:{self.door}" if self.door != self.port else f"127.0.0.1:{self.port}"
        return self.start(name, "flower-client-app", app, *self.security, "--superlink", address, *options)

    def run(self, *overrides: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        command = ["flower-server-app", "app:server", *self.security, "--superlink", f"127.0.0.1:{self.port}"]
        return launch_long([*command, *overrides], self, timeout)

    def command(self, *command: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return launch_long([*command], self, timeout)

    def flwr(self, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return launch_long(["flwr", *arguments], self, timeout)

    def wait_for_log(self, name: str, words: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in self.log(name):
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def results(self) -> Path:
        return max(self.folder.glob("outputs/*/*"))

    def kill(self, name: str) -> None:
        """SIGKILL a node with all that it started."""
        os.killpg(self.processes[name].pid, signal.SIGKILL)

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind, in its own session
            except ProcessLookupError:
                continue


def launch_long(command: list[str], engine: Engine, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=engine.folder, env=engine.environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@contextmanager
def engine(folder: Path, **options):
    started = Engine(folder, **options)
    try:
        yield started
    finally:
        started.stop()


@pytest.mark.slow
def test_four_commands_give_the_adapter_of_the_simulation_bit_for_bit(tmp_path):
    with engine(tmp_path / "deployed", port=8000) as deployed:
        deployed.node("first", "app:client1", f"--keep={tmp_path / 'kept'}", "--name=Hospital A")
        deployed.node("second", "app:client2")
        done = deployed.run(*QUICKSTART)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "finished:completed" in done.stdout
        deployed.wait_for_log("first", "received ")
        assert done.stdout.count("round ") >= 3
        results = json.loads((deployed.results() / "results.json").read_text())
        metrics = read_json_lines(deployed.results() / "metrics.jsonl")
        files = {file.name for file in deployed.results().iterdir()}
    assert {"peft_4", "metrics.jsonl", "results.json", "train_loss.png", "main.log", "settings.json"} <= files
    assert (results["model_loads"], results["processes"], results["tokenizations"]) == (2, 2, 2)
    check_what_the_node_says(deployed.log("first"), tmp_path / "kept", results)
    simulated = simulate(tmp_path / "simulated")
    assert results["adapter_sha256"] == simulated["adapter_sha256"]
    expected = round_seconds(read_json_lines(tmp_path / "simulated" / "metrics.jsonl"))
    took = round_seconds(metrics)
    print(f"seconds a round: {took:.2f} deployed, {expected:.2f} simulated")
    assert took - POLLING_S <= 1.3 * expected


def check_what_the_node_says(said: str, folder: Path, results: dict) -> None:
    """Three lines at the end, on the terminal and in node.log, and the adapter that the server names."""
    [final] = folder.glob("run_*/final")
    assert file_sha256(final / "adapter_model.safetensors") == results["adapter_sha256"]
    assert stat.S_IMODE((folder / "node.log").stat().st_mode) == 0o600
    assert re.search(r"ended after 4 rounds; its adapter is in \S+final, SHA-256 " + results["adapter_sha256"], said)
    assert re.search(r"held-out loss of \d+ rows that nobody trained on here: [\d.]+ before, [\d.]+ after", said)
    assert re.search(r"trained on \d+ of \d+ rows; sent [\d.]+ MB in 6 messages, received", said)
    assert said.count(" ended ") == 1
    assert set(said.splitlines()[-3:]) <= set((folder / "node.log").read_text().splitlines())


def round_seconds(metrics: list[dict]) -> float:
    """Median wall time of the rounds from the second on."""
    return statistics.median(line["seconds"]["wall"] for line in metrics[1:])


def simulate(folder: Path) -> dict:
    command = [
        sys.executable,
        "main.py",
        *QUICKSTART,
        "num_clients=2",
        "strategy.fraction_fit=1.0",
        f"hydra.run.dir={folder}",
    ]
    done = subprocess.run(command, cwd=SUITE_FOLDER, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_stopped_run_goes_on_with_the_adapter_of_one_that_was_not(tmp_path):
    with engine(tmp_path / "deployed") as deployed:
        deployed.node("first", "app:client1")
        deployed.node("second", "app:client2")
        command = ["flower-server-app", "app:server", "--insecure", "--superlink", f"127.0.0.1:{deployed.port}"]
        first = subprocess.Popen(
            [*command, *QUICKSTART, "train.save_every_round=1"], cwd=deployed.folder, env=deployed.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        seen = []
        for line in first.stdout:
            seen.append(line)
            if line.startswith("round 2/"):
                first.send_signal(signal.SIGINT)
        assert first.wait(60) != 0, "".join(seen)
        folder = deployed.results()
        assert not (folder / "results.json").exists(), "".join(seen)
        other = deployed.run(f"resume={folder}", "seed=7")
        assert other.returncode != 0
        assert "seed=7: the run in" in " ".join(other.stdout.split()), other.stdout
        done = deployed.run(f"resume={folder}")
        assert done.returncode == 0, done.stdout + done.stderr
        results = json.loads((folder / "results.json").read_text())
        rounds = [line["round"] for line in read_json_lines(folder / "metrics.jsonl")]
    assert rounds == [1, 2, 3, 4]
    assert results["adapter_sha256"] == simulate(tmp_path / "simulated")["adapter_sha256"]


@pytest.mark.slow
def test_tls_with_node_authentication_refuses_an_unregistered_node(tmp_path):
    with engine(tmp_path, tls=True) as deployed:
        for name in ("first", "second"):
            registered = deployed.flwr("supernode", "register", str(tmp_path / "keys" / f"{name}.pub"), "trial")
            assert registered.returncode == 0, registered.stdout + registered.stderr
        for partition, name in enumerate(("first", "second", "third")):
            key = str(tmp_path / "keys" / name)
            deployed.node(name, "app:client", f"--partition-id={partition}", "--auth-supernode-private-key", key)
        done = deployed.run(*RUN)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "this node's public key is not registered at the SuperLink" in deployed.log("third")
        results = json.loads((deployed.results() / "results.json").read_text())
        assert set(results["rows_used_by_client"]) == {"0", "1"}


@pytest.mark.slow
def test_faults_of_nodes_and_workers_and_a_late_node(tmp_path):
    own = tmp_path / "own.jsonl"
    rows_file(own, 40)
    with engine(tmp_path / "run") as deployed:
        first = deployed.node("first", "app:client1")
        late = subprocess.Popen(["sleep", "8"])
        flwr = subprocess.Popen(
            ["flwr", "run", str(SUITE_FOLDER), "trial", "--stream", "--run-config",
             'overrides="' + " ".join([*RUN, "num_rounds=6", "strategy.round_timeout_s=90"]) + '"'],
            cwd=deployed.folder, env=deployed.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        late.wait()
        deployed.node("second", "app:client2", f"--dataset={own}")  # joins late, with rows of its own
        seen, killed = [], False
        for line in flwr.stdout:
            seen.append(line)
            if line.startswith("round 2/6"):
                [worker] = children(first.pid, "deployment.work")
                os.kill(worker, signal.SIGKILL)
            if line.startswith("round 4/6") and not killed:
                killed = True
                deployed.kill("second")
            if line.startswith("results:"):
                break
        flwr.terminate()
        flwr.wait()
        output = "".join(seen)
        deadline = time.monotonic() + 60
        while "finished:" not in (listed := deployed.flwr("list", "trial", "--format", "json").stdout):
            assert time.monotonic() < deadline, listed
        assert "finished:completed" in listed
        lines = read_json_lines(deployed.results() / "metrics.jsonl")
        assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6], output
        assert lines[0]["clients"] == [0, 1]
        assert lines[0]["num_examples"]["1"] == 38  # two are held out
        assert lines[3]["clients"] == [0, 1]  # the new worker answers by then
        assert lines[-1]["clients"] == [0]
        assert "another one is started" in deployed.log("first")


@pytest.mark.slow
def test_run_whose_clients_all_fail_exits_non_zero_with_the_clients_error(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"instruction": "x", "input": "", "output": ""}\n' * 8)
    with engine(tmp_path / "run") as deployed:
        deployed.node("first", "app:client1", f"--dataset={empty}")
        deployed.node("second", "app:client2", f"--dataset={empty}")
        done = deployed.run(*RUN)
        assert done.returncode == 1, done.stdout + done.stderr
        said = " ".join(done.stdout.split())  # logs are wrapped
        assert "none of its 8 rows has a response that can be trained (8 without an answer; 0 refused" in said
        assert "finished:failed" in done.stdout


def refused(status: int, clock_ahead_s: float = 0) -> httpx.HTTPStatusError:
    date = formatdate(time.time() - clock_ahead_s, usegmt=True)
    response = httpx.Response(status, headers={"date": date}, request=httpx.Request("POST", "http://superlink"))
    return httpx.HTTPStatusError("refused", request=response.request, response=response)


class Fleet:
    """A SuperLink that refuses to activate a node, for one reason."""

    def __init__(self, reason: str) -> None:
        self.reason, self.asked = reason, 0

    def ActivateNode(self, request):
        self.asked += 1
        if self.reason == "in use" and request.heartbeat_interval < 0:
            raise refused(400)
        raise {"fast": refused(401, 30), "slow": refused(401, -400), "proxy": refused(403)}.get(
            self.reason, refused(412)
        )

    RegisterNode = ActivateNode


class Restarted(Fleet):
    """A SuperLink that knows a node as one that is there, and takes its key only after it has taken leave."""

    def __init__(self):
        super().__init__("in use")
        self.is_there, self.pulled = True, 0

    def ActivateNode(self, request):
        if self.is_there:
            super().ActivateNode(request)
        return SimpleNamespace(node_id=7)

    def DeactivateNode(self, request):
        assert request.node_id == 7
        self.is_there = False

    def PullMessages(self, request):
        self.pulled += 1
        raise {1: refused(401), 2: refused(413), 3: refused(403), 4: httpx.ConnectError("gone"), 5: refused(500)}[
            self.pulled
        ]


def test_node_comes_back_after_it_was_not_accepted_and_survives_what_is_refused(monkeypatch):
    monkeypatch.setattr(link, "AGAIN_S", 0.01)
    said = []
    node = link.Link(OPTIONS, ec.generate_private_key(ec.SECP384R1()), said.append)
    node.client, node.node = Restarted(), link.Node(node_id=7)
    with pytest.raises(link.NotAccepted, match="signature"):
        node.receive(1e9)
    node.activate()
    assert (said, node.client.is_there) == ([], False)
    with pytest.raises(link.Refused, match="the server answers 413"):
        node.receive(1e9)
    with pytest.raises(link.RunOver):
        node.receive(1e9)
    with pytest.raises(KeyError):  # it asked on, after it could not be reached, and after an error of the server
        node.receive(1e9)
    assert node.client.pulled == 6
    assert len(said) == 1
    assert "cannot be reached (gone)" in said[0]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("fast", "this machine's clock is 3[01] s ahead of the SuperLink's"),
        ("slow", "this machine's clock is (400|399) s behind the SuperLink's"),
        ("in use", "this node's key is in use"),
        ("unknown", "this node's public key is not registered"),
        ("proxy", "the server's proxy does not let nodes through"),
    ],
)
def test_node_that_is_not_accepted_says_the_true_reason_and_tries_again(reason, words, monkeypatch):
    monkeypatch.setattr(link, "ACTIVATION_S", 0.05)
    said = []
    node = link.Link(OPTIONS, ec.generate_private_key(ec.SECP384R1()), said.append)
    node.client, node.leaving = Fleet(reason), SimpleNamespace(wait=lambda _: time.sleep(0.03))
    with pytest.raises(link.NotAccepted, match=words):
        node.activate()
    assert node.client.asked >= 2
    assert len(said) == 1
    assert re.search(words, said[0])


@pytest.mark.parametrize(("status", "exposed"), [(200, True), (403, False)])
def test_superlink_that_strangers_reach_is_warned_of(status, exposed, monkeypatch):
    class Door(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = argparse.Namespace(superlink=f"localhost:{server.server_port}", insecure=True)
    monkeypatch.setattr(connection, "own_addresses", lambda: ["127.0.0.1"])
    assert connection.exposed_at(options) is None  # only this machine reaches it
    monkeypatch.setattr(connection, "is_local", lambda host: host == "localhost")
    assert connection.exposed_at(options) == (f"127.0.0.1:{server.server_port}" if exposed else None)
    server.shutdown()
    server.server_close()


def test_what_libraries_make_of_own_rows_on_disk_is_private_and_ends_with_the_node(tmp_path):
    for name in ("HF_DATASETS_CACHE", "TMPDIR"):
        assert launchers.worker_environment(str(tmp_path), {"dataset": "x"})[name] == str(tmp_path)
        assert launchers.worker_environment(str(tmp_path), {"eval": "x"})[name] == str(tmp_path)
        assert launchers.worker_environment(str(tmp_path), {}).get(name) != str(tmp_path)


STRANGER = """
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()
Path(MARK).with_suffix(".imported").touch()

@client.query()
def steal(message, context):
    Path(MARK).touch()
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    import time
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in grid.get_node_ids()], timeout=60)
    for reply in replies:
        print("node says:", reply.error.code, reply.error.reason if reply.has_error() else "nothing", flush=True)
"""
PROJECT = """
[project]
name = "stranger"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "stranger"
[tool.flwr.app.components]
serverapp = "thief:server"
clientapp = "thief:client"
"""


@pytest.mark.slow
def test_node_obeys_its_owner_whatever_a_server_or_a_stranger_sends(tmp_path):
    app = tmp_path / "stranger"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "thief.py").write_text(STRANGER.replace("MARK", repr(str(tmp_path / "stolen"))))
    with engine(tmp_path / "run") as deployed:
        deployed.environment |= {"TMPDIR": str(temporary(tmp_path)), "HF_HOME": str(tmp_path / "hf")}
        for name, partition in (("first", 0), ("second", 1)):
            data = rows_file(tmp_path / f"{name}.jsonl", 40)
            deployed.node(name, "app:client", f"--partition-id={partition}", f"--dataset={data}", f"--name={name} site")
        stolen = deployed.flwr("run", str(app), "trial", "--stream")
        assert stolen.stdout.count("this node runs its own code alone") == 2, stolen.stdout + stolen.stderr
        assert bundle.own_digest() in " ".join(stolen.stdout.split()).replace(" ", "")
        assert not (tmp_path / "stolen").exists()
        assert deployed.log("first").count("bundle 'stranger/stranger 1.0.0") == 1

        attack = ["model.lora.target_modules=[embed_tokens]", f"{STEPS}.max_steps=1"]
        refused = deployed.run(*RUN, *attack)
        assert refused.returncode == 1
        assert "embed_tokens: this node's policy allows no embedding" in " ".join(refused.stdout.split())
        assert "embed_tokens: this node's policy allows no embedding" in deployed.log("first") + deployed.log("second")

        long = start_run(deployed, *RUN, f"{STEPS}.max_steps=1000", "strategy.round_timeout_s=600")
        for line in long.stdout:
            if "2 of 2" in line or "held-out" in line or "waiting for the clients" in line:
                time.sleep(25)
                long.send_signal(signal.SIGINT)
                break
        rest = long.communicate(timeout=60)[0]
        assert long.returncode == 130, rest
        assert "stopped" in rest
        for name in ("first", "second"):
            deployed.wait_for_log(name, "ended without an adapter", 60)
        done = deployed.run(*RUN)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "first site" in (deployed.results() / "main.log").read_text()
        own = [file for file in temporary(tmp_path).rglob("flowertune-*/**/*") if file.is_file()]
        assert not [file for file in own if file.stat().st_mode & 0o077]
        assert not list((tmp_path / "hf").rglob("*.arrow"))
    assert not list(temporary(tmp_path).glob("flowertune-*"))  # the rows end with their nodes


def temporary(folder: Path) -> Path:
    (folder / "tmp").mkdir(exist_ok=True)
    return folder / "tmp"


def start_run(deployed: Engine, *overrides: str) -> subprocess.Popen:
    command = ["flower-server-app", "app:server", *deployed.security, "--superlink", f"127.0.0.1:{deployed.port}"]
    return subprocess.Popen(
        [*command, *overrides], cwd=deployed.folder, env=deployed.environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def read_until(run: subprocess.Popen, beginning: str) -> None:
    for line in run.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line begins with {beginning}")


@pytest.mark.slow
def test_every_bad_end_of_a_run_says_why_where_and_how_to_resume(tmp_path):
    settings = [*RUN, "num_rounds=50", "train.save_every_round=1"]
    with engine(tmp_path / "run") as deployed:
        deployed.node("first", "app:client1")
        deployed.node("second", "app:client2")
        run = start_run(deployed, *settings)
        read_until(run, "round 2/")
        for pid in children(deployed.processes["superlink"].pid, "flwr-serverapp"):
            os.kill(pid, signal.SIGKILL)
        said = run.communicate(timeout=300)[0]
        folder = deployed.results()
        assert run.returncode == 1, said
        assert "error: the run's process on the server ended without a word" in said
        assert f"log: {folder}/main.log" in said
        assert f"resume={folder}" in said.splitlines()[-2]
        assert said.splitlines()[-1].endswith("finished:failed")

        run = start_run(deployed, f"resume={folder}")
        read_until(run, "round 4/")
        superlink = deployed.processes["superlink"]
        superlink.send_signal(signal.SIGINT)
        said = run.communicate(timeout=120)[0]
        assert run.returncode == 1, said
        assert "the SuperLink is gone, and the run with it" in said
        assert f"resume={folder}" in said
        superlink.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx, as Debian has it")
def test_guide_for_hospitals_works_as_it_is_written(tmp_path):
    """TLS, keys, a proxy for nodes alone, own rows, --eval on one, a late node, a killed one, a resume, the end."""
    sites = ("first", "second", "third")
    with engine(tmp_path / "run", tls=True, proxy=True) as deployed:
        keys = deployed.folder / "keys"
        for name in sites:
            key, named = str(keys / f"{name}.pub"), f"{name} hospital"
            registered = deployed.flwr("supernode", "register", key, "trial", "--name", named)
            assert registered.returncode == 0, registered.stdout + registered.stderr

        def start(partition: int, *more: str) -> None:
            name = sites[partition]
            data = rows_file(tmp_path / f"{name}.jsonl", 40 + partition)
            deployed.node(
                name, "app:client", f"--partition-id={partition}", f"--auth-supernode-private-key={keys / name}",
                f"--dataset={data}", f"--keep={tmp_path / 'kept' / name}", *more,
            )  # fmt: skip

        stranger = [f"--root-certificates={keys / 'ca.pem'}", f"--superlink=localhost:{deployed.door}"]
        through = deployed.command("flower-server-app", "app:server", *stranger, *RUN)
        assert through.returncode == 1
        assert "403" in through.stdout + through.stderr, through.stdout + through.stderr
        start(0, f"--eval={rows_file(tmp_path / 'heldout.jsonl', 16)}")
        start(1)
        settings = [*RUN, "num_rounds=8", "num_clients=2", "train.save_every_round=1", "strategy.round_timeout_s=60"]
        run = start_run(deployed, *settings, "evaluate.every_rounds=4")
        seen = []
        for line in run.stdout:
            seen.append(line)
            if line.startswith("round 1/"):
                start(2)  # late
            if line.startswith("round 5/"):
                run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130, "".join(seen)
        folder = deployed.results()
        assert any(line.startswith("to resume: ") for line in seen), "".join(seen)
        deployed.kill("second")
        start(1)  # at once: its key is in use for a minute
        done = deployed.run(f"resume={folder}", timeout=600)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert "this node's key is in use" in deployed.log("second")
        results = json.loads((folder / "results.json").read_text())
        lines = read_json_lines(folder / "metrics.jsonl")
        assert [line["round"] for line in lines] == list(range(1, 9))
        assert {"0", "1", "2"} == set(results["rows_used_by_client"]), output
        assert all(line["held_out"] for line in lines if line["round"] in (4, 8)), output
        for name in sites:
            deployed.wait_for_log(name, "received ")
            [kept] = (tmp_path / "kept" / name).glob("run_*/final/adapter_model.safetensors")
            assert file_sha256(kept) == results["adapter_sha256"]
        assert "first hospital" in (folder / "main.log").read_text()
        assert not [word for word in ("Say 3.", str(tmp_path / "first.jsonl")) if word in output]


SERVER_MEMORY = """
import json, sys, numpy as np
from pathlib import Path
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from settings.compose import compose
from exchange.guard import REPORT
from server.federation import Federation
from tests.federation import LocalGrid, Silent, identify_as_flower_task
from utils import read_json_lines

identify_as_flower_task()
folder, clients, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = compose([f"model.name={folder}", f"num_clients={clients}", "strategy.fraction_fit=1.0",
                  f"num_rounds={rounds}", "train.save_every_round=10"])

def app(message, context):
    partition = context.node_config["partition-id"]
    if message.metadata.message_type == "query":
        facts = ConfigRecord({"partition-id": partition, "num-rows": 100, "device": "none"})
        return Message(RecordDict({"client": facts}), reply_to=message)
    report = MetricRecord(dict.fromkeys(REPORT, 0.0) | {"num-examples": 100, "train_loss": 1.0})
    arrays = ArrayRecord({name: Array(array.numpy() + 1) for name, array in message.content["arrays"].items()})
    records = {"arrays": arrays, "metrics": report, "worker": ConfigRecord({"process": "none"})}
    return Message(RecordDict(records), reply_to=message)

run = folder / f"run{clients}"
run.mkdir()
federation = Federation(config, run, "template", Silent())
federation.run(LocalGrid(app, clients))
peaks = [line["server_peak_memory_bytes"] for line in read_json_lines(run / "metrics.jsonl")]
print(json.dumps([peaks, sum(value.nbytes for value in federation.record.state.adapter.values())]))
"""


def server_memory(folder: Path, clients: int, rounds: int, **shape: int) -> tuple[list[int], int]:
    """Peak memory of the server's process after each round, and the bytes of its adapter."""
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=32000, **shape).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", SERVER_MEMORY, str(folder), str(clients), str(rounds)],
        cwd=SUITE_FOLDER, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peaks, adapter_bytes = json.loads(done.stdout)
    return peaks, adapter_bytes


@pytest.mark.parametrize(("clients", "limit"), [(2, 1.5e9), (10, 2.0e9)])
@pytest.mark.slow
def test_server_with_a_7b_shaped_adapter_needs_no_base_weights_and_little_memory(clients, limit, tmp_path):
    shape = dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32)
    peaks, adapter_bytes = server_memory(tmp_path, clients, 2, **shape)
    assert adapter_bytes == 67_108_864
    print(f"{clients} clients: {peaks[-1] / 1e9:.2f} GB")
    assert peaks[-1] < limit


@pytest.mark.slow
def test_server_does_not_grow_over_fifty_rounds(tmp_path):
    shape = dict(hidden_size=512, num_hidden_layers=4, intermediate_size=1024, num_attention_heads=4)
    peaks, _ = server_memory(tmp_path, 10, 50, **shape)
    assert peaks[-1] < 1.02 * peaks[9]
