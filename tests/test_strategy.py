"""The server: who is sampled, what is averaged, what is dropped, what a run leaves behind."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from peft import PeftModel

import client
import model as adapters
from client import Site, Task, Worker, client_app, fine_tune
from exchange.guard import REPORT, check_reply
from server.sampling import sample
from server.strategies import make_strategy
from settings.schema import RunError
from tests.federation import Clients, LocalGrid, identify_as_flower_task, make_federation, run_locally, small
from utils import cosine_learning_rate, read_json_lines

STRATEGIES = ["fedavg", "fedprox", "fedavgm", "fedadam", "fedmedian"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of four clients, two of them in each of three rounds, with evaluation."""
    folder = tmp_path_factory.mktemp("run")
    config = small("num_rounds=3", "train.save_every_round=2", "dataset.holdout=0.02", "strategy.fraction_evaluate=0.5")
    federation, summary = run_locally(config, folder)
    return federation, summary, folder


def test_run_folder_holds_what_the_design_promises(finished):
    _, summary, folder = finished
    files = {"metrics.jsonl", "results.json", "train_loss.png", "peft_2", "peft_3", "best"}
    assert {file.name for file in folder.iterdir()} - {"peft_1"} == files  # 1, if its held-out loss is the lowest
    checkpoint = {
        "adapter_model.safetensors",
        "adapter_config.json",
        "chat_template.jinja",
        "README.md",
        "train_loss.png",
        "state.json",
        "sha256.json",
    }
    assert {file.name for file in (folder / "peft_3").iterdir()} == checkpoint
    assert json.loads((folder / "results.json").read_text())["final_train_loss"] == summary["final_train_loss"]
    assert (folder / "train_loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_of_a_round_add_up(finished):
    federation, summary, folder = finished
    lines = read_json_lines(folder / "metrics.jsonl")
    assert [line["round"] for line in lines] == [1, 2, 3]
    adapter_bytes = sum(
        value.nbytes + 128 for value in federation.record.state.adapter.values()
    )  # with numpy's headers
    for line in lines:
        assert line["bytes_up"] == 2 * adapter_bytes
        before = 2 if line["round"] == 1 else 0  # two clients evaluate before the first round
        assert line["bytes_down"] == (4 + before) * adapter_bytes  # to two that train, and to two that evaluate
        assert line["rows"] == 2 * 2 * 4  # clients, steps, rows a step
        assert len(line["clients"]) == 2
        train = federation.config.train
        highest, lowest = train.learning_rate_max, train.learning_rate_min
        assert line["learning_rate"] == cosine_learning_rate(line["round"], 3, highest, lowest)
        assert set(line["seconds"]) == {"load", "data", "train", "transfer", "aggregate", "wall"}
        assert line["held_out"]["clients"]["loss"] > 0
    assert sum(line["model_loads"] for line in lines) == summary["processes"] == 1
    trained = {client for line in lines for client in line["clients"]}
    assert summary["tokenizations"] <= 4
    assert summary["rows_used_by_client"].keys() == trained
    assert summary["rows_used"] == 3 * 16  # far from used up: every row of every round was new


def test_checkpoint_is_the_final_adapter_and_loads_with_peft(finished):
    federation, _, folder = finished
    loaded = adapters.load_adapter(folder / "peft_3")
    assert all(np.array_equal(loaded[name], value) for name, value in federation.record.state.adapter.items())
    base = adapters.load_base(federation.config.model, "cpu")
    model = PeftModel.from_pretrained(base, folder / "peft_3")
    assert model.peft_config["default"].r == 4
    saved = json.loads((folder / "peft_3" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "quickstart/model"


def test_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path):
    digests = [
        run_locally(small("num_rounds=1", *extra), tmp_path / name)[1]["adapter_sha256"]
        for name, extra in {"a": [], "b": [], "c": ["seed=1"]}.items()
    ]
    assert digests[0] == digests[1] != digests[2]


def test_one_client_fedavg_equals_local_training(tmp_path):
    config = small("num_clients=1", "strategy.fraction_fit=1.0", "num_rounds=3")
    federation, _ = run_locally(config, tmp_path)
    worker, adapter = Worker(config), make_federation(config, tmp_path / "other").record.state.adapter
    for number in (1, 2, 3):
        rate = cosine_learning_rate(number, 3, config.train.learning_rate_max, config.train.learning_rate_min)
        adapter, _ = fine_tune(worker, adapter, 0, Task(number, rate, first_row=(number - 1) * 8))
    assert all(np.array_equal(adapter[name], value) for name, value in federation.record.state.adapter.items())


def test_sampling_depends_on_seed_and_round_alone():
    assert sample(range(20), 2, "train", 0, 1) == sample(reversed(range(20)), 2, "train", 0, 1)
    rounds = {tuple(sample(range(20), 2, "train", 0, number)) for number in range(1, 50)}
    assert len(rounds) > 30
    drawn = [client for number in range(2000) for client in sample(range(20), 2, "train", 7, number)]
    counts = np.bincount(drawn, minlength=20)
    assert counts.min() > 150  # 200 expected, deviation 13
    assert counts.max() < 250


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_conf_runs(name, tmp_path):
    federation, summary = run_locally(small(f"strategy={name}", "strategy.fraction_fit=0.5"), tmp_path)
    assert summary["rounds"] == 2
    assert type(federation.strategy).__name__.lower() == name
    assert np.isfinite(summary["final_train_loss"])


def test_a_strategy_may_be_any_flower_strategy_with_its_arguments():
    chosen = "strategy._target_=flwr.serverapp.strategy.FedTrimmedAvg"
    strategy = make_strategy(small(chosen, "strategy.beta=0.3"))
    assert (type(strategy).__name__, strategy.beta, strategy.fraction_train) == ("FedTrimmedAvg", 0.3, 1.0)


def test_dora_starts_from_the_magnitudes_of_the_base_model(tmp_path):
    federation, _ = run_locally(small("model.lora.use_dora=true", "num_rounds=1"), tmp_path)
    assert any("magnitude" in name for name in federation.record.state.adapter)
    assert set(federation.record.state.adapter) == set(federation.shapes)


# --- replies --------------------------------------------------------------------------------------

SHAPES = {"a": (2,), "b": (1, 2)}


def reply_to(message: Message, a, examples=1.0, **changes) -> Message:
    arrays = {"a": Array(np.array(a, np.float32)), "b": Array(np.zeros((1, 2), np.float32))} | changes.get("arrays", {})
    metrics = dict.fromkeys(REPORT, 0.0) | {"num-examples": examples, "train_loss": 1.0} | changes.get("metrics", {})
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: array for name, array in arrays.items() if array is not None}),
            "metrics": MetricRecord({name: value for name, value in metrics.items() if value is not None}),
            "worker": ConfigRecord({"process": "test:1"}),
        }
    )
    return Message(content, reply_to=message)


@pytest.fixture
def question():
    identify_as_flower_task()
    grid = LocalGrid(None, 1)
    message = Message(RecordDict(), 1000, "train")
    message.metadata.__dict__["_message_id"] = "question"
    assert grid.get_node_ids() == [1000]
    return message


def lying_array() -> Array:
    """An array that claims another shape than its bytes have."""
    honest = Array(np.ones((1, 1), np.float32))
    return Array("float32", (1, 2), honest.stype, honest.data)


FAULTS = {
    "missing tensor": (dict(arrays={"b": None}), "other tensors"),
    "extra tensor": (dict(arrays={"c": Array(np.zeros(1, np.float32))}), "other tensors"),
    "wrong shape": (dict(arrays={"b": Array(np.zeros((2, 1), np.float32))}), "b is float32 (2, 1)"),
    "wrong dtype": (dict(arrays={"b": Array(np.zeros((1, 2), np.float64))}), "b is float64"),
    "a shape that is a lie": (dict(arrays={"b": lying_array()}), "b is float32 (1, 1)"),
    "torn bytes": (dict(arrays={"b": Array("float32", (1, 2), "numpy.ndarray", b"torn")}), "b cannot be read"),
    "missing report": (dict(metrics={"rows": None}), "does not report exactly"),
    "unknown report": (dict(metrics={"extra": 1.0}), "does not report exactly"),
    "not a number": (dict(arrays={"b": Array(np.full((1, 2), np.nan, np.float32))}), "b is not finite"),
    "infinite": (dict(arrays={"b": Array(np.full((1, 2), np.inf, np.float32))}), "b is not finite"),
    "no examples": (dict(metrics={"num-examples": 0}), "num-examples=0"),
    "negative weight": (dict(metrics={"num-examples": -3}), "num-examples=-3"),
    "loss not a number": (dict(metrics={"train_loss": float("nan")}), "train_loss=nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_reply_that_can_not_be_averaged_is_refused_with_its_reason(fault, question):
    changes, reason = FAULTS[fault]
    assert reason in check_reply(reply_to(question, [0, 0], **changes), SHAPES)
    assert check_reply(reply_to(question, [0, 0]), SHAPES) is None


def test_average_weights_adapters_by_number_of_examples(question):
    replies = [reply_to(question, [0.0, 4.0], 1), reply_to(question, [4.0, 0.0], 3)]
    arrays, _ = make_strategy(small()).aggregate_train(1, replies)
    np.testing.assert_array_equal(arrays["a"].numpy(), [3.0, 1.0])  # (1*[0, 4] + 3*[4, 0]) / 4


class Sabotage:
    """A ClientApp whose clients in `failing` answer what `answer` makes of their reply."""

    def __init__(self, app, failing, answer):
        self.app, self.failing, self.answer = app, failing, answer

    def __call__(self, message, context):
        reply = self.app(message=message, context=context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] in self.failing:
            return self.answer(message, reply)
        return reply


def fail(message, _):
    return Message(Error(1, "Traceback (most recent call last):\nOSError: disk is gone"), reply_to=message)


def test_failing_client_is_named_and_the_rest_is_averaged(tmp_path):
    config = small("strategy.fraction_fit=1.0", "num_rounds=1")
    federation, summary = run_locally(config, tmp_path, Sabotage(client_app(Site(config)), {2}, fail))
    record = federation.progress.rounds[0]
    assert record["clients"] == [0, 1, 3]
    assert federation.progress.warnings == ["round 1: client 2 is left out: OSError: disk is gone"]
    assert 2 not in federation.record.state.rows_seen


class Losing(LocalGrid):
    """A grid that loses partition 1 in round 1, as the engine reports it: in its own name."""

    def answer(self, message):
        name = super().answer(message)
        if message.metadata.message_type == "train" and self.nodes[message.metadata.dst_node_id] == 1:
            lost = Message(Error(3, "node unavailable"), reply_to=message)
            lost.metadata.__dict__["_src_node_id"] = 1
            self.replies[name] = lost
        return name


def test_node_that_the_engine_gives_up_is_left_out_by_its_own_name(tmp_path):
    config = small("strategy.fraction_fit=1.0", "num_rounds=1")
    client._resident.clear()
    federation = make_federation(config, tmp_path)
    federation.run(Losing(client_app(Site(config)), 4))
    assert federation.progress.rounds[0]["clients"] == [0, 2, 3]
    assert federation.progress.warnings == ["round 1: client 1 is left out: node unavailable"]


class Restarting(LocalGrid):
    """A grid on which the node of partition 0 restarts under a new id after the first round."""

    def get_node_ids(self):
        if "train" in self.seen and 1 not in self.nodes:
            self.nodes = {node: partition for node, partition in self.nodes.items() if partition} | {1: 0}
        return list(self.nodes)

    seen: set = set()

    def answer(self, message):
        self.seen = self.seen | {message.metadata.message_type}
        return super().answer(message)


@pytest.mark.slow
def test_node_that_restarts_takes_its_place_again(tmp_path):
    config = small("strategy.fraction_fit=1.0", "num_rounds=3")
    client._resident.clear()
    federation = make_federation(config, tmp_path)
    federation.run(Restarting(client_app(Site(config)), 4))
    assert federation.clients.nodes[0] == 1
    assert [record["clients"] for record in federation.progress.rounds] == [[0, 1, 2, 3]] * 3


def test_round_without_a_valid_reply_ends_the_run_with_the_clients_traceback(tmp_path):
    config = small()
    with pytest.raises(RunError, match=r"(?s)round 1: not one valid reply.*Traceback.*disk is gone"):
        run_locally(config, tmp_path, Sabotage(client_app(Site(config)), set(range(4)), fail))
    assert not (tmp_path / "results.json").exists()


def test_client_exception_carries_its_own_traceback(tmp_path, monkeypatch):
    def explode(*_):
        raise ZeroDivisionError("inside the client")

    monkeypatch.setattr(client, "fine_tune", explode)
    with pytest.raises(RunError, match="(?s)in explode.*ZeroDivisionError: inside the client"):
        run_locally(small(), tmp_path)


def test_rows_without_a_response_are_reported_once_for_each_client(tmp_path):
    rows = [{"instruction": "x", "input": "", "output": "y" if number % 2 else ""} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small(f"dataset.name={tmp_path / 'a.jsonl'}", "strategy.fraction_fit=1.0")
    federation, _ = run_locally(config, tmp_path / "run")
    assert len(federation.progress.warnings) == 4
    left_out = [int(warning.split()[2]) for warning in federation.progress.warnings]
    assert sum(left_out) == 20
    assert sum(record["without_response"] for record in federation.progress.rounds) == 2 * 20


@pytest.mark.parametrize("own", [False, True])
def test_card_is_told_whether_a_client_has_rows_of_its_own(tmp_path, monkeypatch, own):
    told = []
    monkeypatch.setattr("runs.record.write_card", lambda *arguments: told.append(arguments[-1]))
    config = small("num_rounds=1")
    run_locally(config, tmp_path, Clients(config, own_data=own))
    assert told == [own]
