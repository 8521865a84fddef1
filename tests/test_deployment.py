"""Deployment: real SuperLinks and nodes on loopback, started by the launchers; and what a node refuses."""

import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from flwr.cli.build import build_fab_from_disk

from deployment import certificates, launchers, resident
from learning import training
from settings.schema import SettingsError
from tests.conftest import children
from tests.test_house import modules
from utils import SUITE_FOLDER, read_json_lines

BIN = Path(sys.executable).parent
QUICKSTART = [
    "experiment=quickstart",
    "dataset.eval_name=null",
    "num_rounds=4",
    "train.training_arguments.max_steps=40",
]
RUN = ["experiment=quickstart", "evaluate.answers=2", "num_rounds=3", "train.training_arguments.max_steps=2"]
POLLING_S = 6.0  # Flower's: the SuperNode asks for messages, and the server for replies


# --- what a node accepts, and what the launchers refuse -------------------------------------------

PRIVATE = {"partition-id": 0}


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


def test_node_uses_its_own_rows_and_ignores_the_servers_data(tmp_path):
    own = tmp_path / "own.jsonl"
    config, own_rows = resident.node_settings("experiment=quickstart", PRIVATE | {"dataset": str(own)})
    assert (config.dataset.name, own_rows) == (str(own), True)
    config, own_rows = resident.node_settings("""experiment=quickstart 'model.cache_folder="/tmp/x"'""", PRIVATE)
    assert config.model.cache_folder is None  # where a node writes is its own business too
    assert (config.dataset.name, own_rows) == (str(SUITE_FOLDER / "quickstart/data/train.jsonl"), False)


def test_server_learns_no_value_of_a_nodes_column_unless_the_node_allows_it(tmp_path):
    own = PRIVATE | {"dataset": str(tmp_path / "own.jsonl")}
    for node, column in ((own, ""), (PRIVATE | {"eval": "x"}, ""), (own | {"category-column": "ward"}, "ward")):
        config, _ = resident.node_settings("experiment=quickstart dataset.category_column=output", node)
        assert config.dataset.category_column == column
    config, _ = resident.node_settings("experiment=quickstart dataset.eval_name=owner/data", PRIVATE | {"eval": "x"})
    assert config.dataset.eval_name == "x"


@pytest.mark.parametrize(
    "demand",
    [
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
        config, _ = resident.node_settings(f"experiment=quickstart {demand}", PRIVATE)
        training.training_arguments(config, "unused")

    with pytest.raises(SettingsError) as raised:
        obey()
    assert os.environ["HOME"] not in str(raised.value)


def launch(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False, **options)


@pytest.mark.slow  # a claim about time, which a busy machine cannot keep
def test_absent_superlink_gets_one_clear_line_within_15_seconds():
    start, port = time.monotonic(), launchers.free_port()
    done = launch(str(BIN / "flower-server-app"), "app:server", "--insecure", f"--superlink=127.0.0.1:{port}")
    assert time.monotonic() - start < 15
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: --insecure")]
    assert len(errors) == 1
    assert f"--superlink=127.0.0.1:{port}: no SuperLink answers" in errors[0]
    assert done.stderr.startswith("warning: --insecure")


def test_node_without_a_superlink_gets_one_clear_line(monkeypatch, capsys):
    monkeypatch.setattr(launchers, "REACH_S", 0.2)
    monkeypatch.setattr(launchers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        sys, "argv", ["flower-client-app", "app:client1", f"--superlink=127.0.0.1:{launchers.free_port()}"]
    )
    assert launchers.client_command() == 2
    assert "no SuperLink answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["flower-client-app", "app:nobody"], "use app:client, app:client1, app:client2"),
        (["flower-client-app", "app:client"], "needs --partition-id"),
        (["flower-client-app", "app:client1", "--dataset=/no/such"], "--dataset=/no/such: no such file"),
        (["flower-client-app", "app:client1", "--root-certificates=/no/such"], "no such file"),
        (["flower-client-app", "app:client1", "--dataset=" + "x" * 300], "no such file"),
        (["flower-client-app", "app:client1", "--partition-id=3"], "app:client1 has its own; use app:client"),
        (["flower-client-app", "app:client1", "--node-config", "a=1"], "--node-config: decided by this launcher"),
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
def test_wrong_launcher_arguments_get_one_clear_line(arguments, expected):
    done = launch(str(BIN / arguments[0]), *arguments[1:])
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert expected in done.stderr


def test_worker_answers_only_who_knows_the_key(tmp_path):
    environment = os.environ | {"FLOWERTUNE_WORKER": str(tmp_path / "worker"), "FLOWERTUNE_WORKER_KEY": "aa" * 32}
    worker = launchers.start_worker(environment)
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "worker").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        from multiprocessing import AuthenticationError
        from multiprocessing.connection import Client

        with pytest.raises((AuthenticationError, EOFError, ConnectionError)):
            Client(str(tmp_path / "worker"), "AF_UNIX", b"wrong")
        assert worker.poll() is None  # and it lives on
        with Client(str(tmp_path / "worker"), "AF_UNIX", bytes.fromhex("aa" * 32)) as connection:
            connection.send(("nothing", "experiment=quickstart", PRIVATE, None))
            assert connection.recv()[0] is False
    finally:
        worker.stdin.close()  # as when the launcher dies
        assert worker.wait(60) == 0


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


@pytest.mark.parametrize("text", ["a b", "it's", 'say "hi"', "back\\slash", "ü😀", "a,b=[1,2]"])
def test_any_text_reaches_the_run_config_and_the_node_config_as_it_is(text):
    from flwr.cli.config_utils import parse_config_args

    assert parse_config_args([f"overrides={launchers.toml_text(text)}"])["overrides"] == text


# --- the engine, for real -------------------------------------------------------------------------


class Engine:
    """A SuperLink and nodes below one folder; every process it starts is ended by its id."""

    def __init__(self, folder: Path, tls: bool = False, port: int = 0) -> None:
        self.folder, self.port, self.tls = folder, port or launchers.free_port(), tls
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
        address = f"127.0.0.1:{self.port}"
        return self.start(name, "flower-client-app", app, *self.security, "--superlink", address, *options)

    def run(self, *overrides: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        command = ["flower-server-app", "app:server", *self.security, "--superlink", f"127.0.0.1:{self.port}"]
        return launch_long([*command, *overrides], self, timeout)

    def flwr(self, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return launch_long(["flwr", *arguments], self, timeout)

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
        deployed.node("first", "app:client1")
        deployed.node("second", "app:client2")
        done = deployed.run(*QUICKSTART)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "finished:completed" in done.stdout
        assert done.stdout.count("round ") >= 3
        results = json.loads((deployed.results() / "results.json").read_text())
        metrics = read_json_lines(deployed.results() / "metrics.jsonl")
        files = {file.name for file in deployed.results().iterdir()}
    assert {"peft_4", "metrics.jsonl", "results.json", "train_loss.png", "main.log", "settings.json"} <= files
    assert (results["model_loads"], results["processes"], results["tokenizations"]) == (2, 2, 2)
    simulated = simulate(tmp_path / "simulated")
    assert results["adapter_sha256"] == simulated["adapter_sha256"]
    expected = round_seconds(read_json_lines(tmp_path / "simulated" / "metrics.jsonl"))
    took = round_seconds(metrics)
    print(f"seconds a round: {took:.2f} deployed, {expected:.2f} simulated")
    assert took - POLLING_S <= 1.3 * expected


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
        assert deployed.processes["third"].poll() not in (None, 0), deployed.log("third")
        results = json.loads((deployed.results() / "results.json").read_text())
        assert set(results["rows_used_by_client"]) == {"0", "1"}


@pytest.mark.slow
def test_faults_of_nodes_and_workers_and_a_late_node(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text('{"instruction": "Say hello.", "input": "", "output": "Hello, friend."}\n' * 40)
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
                [worker] = children(first.pid, "deployment.resident")
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
        assert lines[0]["num_examples"]["1"] == 40
        assert lines[3]["clients"] == [0, 1]  # the new worker answers by then
        assert lines[-1]["clients"] == [0]
        assert "another" in deployed.log("first")


@pytest.mark.slow
def test_run_whose_clients_all_fail_exits_non_zero_with_the_clients_error(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"instruction": "x", "input": "", "output": ""}\n' * 8)
    with engine(tmp_path / "run") as deployed:
        deployed.node("first", "app:client1", f"--dataset={empty}")
        deployed.node("second", "app:client2", f"--dataset={empty}")
        done = deployed.run(*RUN)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "none of its 8 rows has a response (column output)" in " ".join(done.stdout.split())  # logs are wrapped
        assert "finished:failed" in done.stdout


SERVER_MEMORY = """
import json, sys, numpy as np
from pathlib import Path
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from settings.compose import compose
from exchange.guard import REPORT
from server.federation import Federation
from tests.conftest import LocalGrid, Silent, identify_as_flower_task
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
