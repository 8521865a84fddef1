"""Sites as the server knows them: the real server, and what a node does for a message, without an engine between."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid import HttpGrid
from safetensors import SafetensorError

import client
from deployment.work import answered
from exchange import clients as exchange_clients
from exchange import folding
from exchange.clients import Clients
from exchange.faults import CLIENT_ERROR, SILENT
from exchange.kinds import HANDLER_NAMES
from exchange.pulling import SLACK_BYTES, pull
from exchange.transfer import to_record
from server import sites
from settings.compose import compose
from settings.schema import RunError
from tests.federation import SMALL, LocalGrid, Silent, identify_as_flower_task, make_federation
from utils import file_sha256, read_json_lines

OVERRIDES = [
    *SMALL,
    "num_clients=2",
    "strategy.fraction_fit=1.0",
    "strategy.final_wait_s=0",
    "train.training_arguments.per_device_train_batch_size=8",
    "train.micro_batch_size=4",
]


class Sites(LocalGrid):
    """A grid whose nodes are sites, each with a key and a worker of its own. A node's config is what a launcher makes.

    `away` are nodes that the SuperLink does not list; `mute` are those that answer nothing.
    """

    def __init__(self, configs, *overrides):
        super().__init__(None, 0)
        self.configs, self.overrides = dict(configs), [*OVERRIDES, *overrides]
        self.workers, self.away, self.mute, self.seen = {}, set(), set(), []

    def get_nodes(self):
        there = set(self.configs) - self.away
        return [
            SimpleNamespace(node_id=node, public_key=b"%d" % node, name="", last_activated_at="")
            for node in sorted(there)
        ]

    def answer(self, message):
        name = f"message-{next(self.numbers)}"
        message.metadata.__dict__["_message_id"] = name
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        self.seen.append((kind, node, message))
        if node in self.mute or node in self.away:
            return name
        client._resident.clear()
        client._resident.update(self.workers.get(node, {}))
        words = " ".join(f"'{text}'" for text in self.overrides)
        found = answered(HANDLER_NAMES[kind], words, self.configs[node] | {"run-id": 7}, message.content)
        assert sum(len(record) for record in message.content.array_records.values()) <= 1  # all arrays as one
        self.workers[node] = dict(client._resident)
        content = Error(found.code, found.told) if found.code else found.content
        self.replies[name] = Message(content, reply_to=message)
        return name


def rows(path, first=0, count=24):
    lines = [
        {"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."}
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def site(tmp_path, partition, name, **more):
    data = rows(tmp_path / f"{name}.jsonl", 100 * partition)
    key = {"rows-key": f"{partition:02d}" * 8}
    return {"partition-id": partition, "name": f"Hospital {name}", "dataset": data, "resident": True} | key | more


@pytest.fixture
def two(tmp_path):
    yield {
        node: site(tmp_path, node - 1, name, keep=str(tmp_path / f"keep{name}")) for node, name in ((1, "A"), (2, "B"))
    }
    client._resident.clear()


def federation_of(grid, folder, resumes=False):
    federation = make_federation(compose(grid.overrides, "deployment"), folder)
    if resumes:
        federation.restore()
    return federation


def test_every_site_ends_with_the_adapter_that_the_server_names(two, tmp_path):
    grid = Sites(two, "dataset.holdout=0.5")
    federation = federation_of(grid, tmp_path / "run")
    summary = federation.run(grid)
    for node, config in two.items():
        kept = tmp_path / config["keep"] / "run_7" / "final"
        assert file_sha256(kept / "adapter_model.safetensors") == summary["adapter_sha256"]
        server = tmp_path / "run" / "peft_2"
        for name in ("README.md", "chat_template.jinja"):
            assert (kept / name).read_text() == (server / name).read_text()
        lora = [json.loads((folder / "adapter_config.json").read_text()) for folder in (kept, server)]
        assert lora[0]["target_modules"] == lora[1]["target_modules"]
        client._resident.clear()
        client._resident.update(grid.workers[node])
        losses = answered("losses", " ".join(f"'{text}'" for text in grid.overrides), config | {"run-id": 7}, None)
        found = losses.content["losses"]
        assert found["rows"] == 12
        assert found["after"] != found["before"]
        [worker] = client._resident.values()
        assert found["before"] == client.figures(client.evaluate_adapter(worker, worker.initial, node - 1))["loss"]
    assert federation.progress.warnings == []


def test_server_that_names_another_adapter_than_it_sends_is_found_out(two, tmp_path):
    grid = Sites({1: two[1]}, "num_clients=1", "num_rounds=1")
    federation = federation_of(grid, tmp_path / "run")
    federation.run(grid)
    [(_, _, message)] = [seen for seen in grid.seen if seen[0] == "query.final"]
    words = " ".join(f"'{text}'" for text in grid.overrides)
    config = dict(message.content["config"])
    for wrong in ({"final-sha256": "0" * 64}, {}):
        arrays = folding.unfolded(message.content)["final"] if wrong else ArrayRecord()
        content = RecordDict({"final": arrays, "config": ConfigRecord(config | wrong)})
        found = answered("final", words, two[1] | {"run-id": 8}, content)
        assert found.code
        assert "the server names" in found.told or "none of this run" in found.told


def test_late_node_does_not_take_the_place_of_another(two, tmp_path):
    class Late(Sites):
        def get_nodes(self):
            if any(kind == "train" for kind, *_ in self.seen):
                self.configs[3] = site(tmp_path, 0, "C")
            return super().get_nodes()

    grid = Late(two, "num_rounds=3")
    federation = federation_of(grid, tmp_path / "run")
    federation.run(grid)
    assert federation.clients.nodes[0] == 1
    assert {node for kind, node, _ in grid.seen if kind == "train"} == {1, 2}
    [warning] = federation.progress.warnings
    assert "node 3 (Hospital C) says that it is client 0 (Hospital A, node 1)" in warning
    sites = json.loads((tmp_path / "run" / "sites.json").read_text())
    assert (sites["0"]["name"], sites["1"]["name"]) == ("Hospital A", "Hospital B")


def test_resume_with_other_rows_is_refused_by_name_and_with_the_same_goes_on(two, tmp_path):
    grid = Sites(two)
    federation_of(grid, tmp_path / "run").run(grid)
    changed = Sites({1: two[1], 2: two[2] | {"dataset": rows(tmp_path / "other.jsonl", 500)}})
    with pytest.raises(RunError, match=r"client 1 \(Hospital B, away\): its own rows are not those with which"):
        federation_of(changed, tmp_path / "run", resumes=True).run(changed)
    stranger = Sites({1: two[1], 4: two[2]})  # another key
    with pytest.raises(RunError, match=r"node 4 \(Hospital B\) says that it is client 1 \(Hospital B, away\)"):
        federation_of(stranger, tmp_path / "run", resumes=True).run(stranger)


@pytest.mark.slow
def test_only_sites_with_rows_of_their_own_measure_the_held_out_set(two, tmp_path):
    own = rows(tmp_path / "heldout.jsonl", 900, 16)
    grid = Sites(
        {1: two[1], 2: two[2] | {"eval": own}},
        "dataset.eval_name=quickstart/data/heldout.jsonl",
        "evaluate.every_rounds=1",
    )
    federation = federation_of(grid, tmp_path / "run")
    federation.run(grid)
    assert [node for kind, node, _ in grid.seen if kind == "evaluate"] == [2, 2, 2]
    assert len([line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["held_out"]]) == 2
    assert federation.progress.warnings == []


def test_what_a_policy_does_not_allow_ends_the_run_with_the_sites_name(two, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_steps: 1\n")
    grid = Sites({1: two[1], 2: two[2] | {"policy": str(policy)}})
    with pytest.raises(
        ValueError, match=r"node 2 refuses: train.training_arguments.max_steps=2: .* at most 1 \(max_steps"
    ):
        federation_of(grid, tmp_path / "run").run(grid)


def test_silent_node_is_set_aside_once_and_named(two, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange_clients, "INTRODUCTION_S", 0.3)
    grid = Sites(two | {3: site(tmp_path, 2, "C")}, "num_rounds=3")
    grid.mute = {3}
    federation = federation_of(grid, tmp_path / "run")
    start = time.monotonic()
    federation.clients = Clients(grid, 3600.0, federation.progress)
    federation.clients.wait_for(2)
    federation.clients.strict = False
    for _ in range(3):
        federation.clients.wait_for(2)
    assert time.monotonic() - start < 20
    assert federation.progress.warnings == [
        w for w in federation.progress.warnings if w.startswith("node 3 does not say")
    ]
    assert len(federation.progress.warnings) == 1
    assert set(federation.clients.nodes) == {0, 1}
    assert [node for _, node, _ in grid.seen] == [1, 2, 3]  # asked once


def test_nobody_waits_in_a_round_for_a_newcomer_that_is_downloading(two, tmp_path):
    grid = Sites(two | {3: site(tmp_path, 2, "C")})
    answer = grid.answer

    def loading(message):
        name = answer(message)
        if message.metadata.dst_node_id == 3:
            facts = dict(grid.replies[name].content["client"]) | {"loading": "a large model"}
            grid.replies[name] = Message(RecordDict({"client": ConfigRecord(facts)}), reply_to=message)
        return name

    grid.answer = loading
    federation = federation_of(grid, tmp_path / "run")
    federation.clients = Clients(grid, 3600.0, federation.progress)
    for _ in range(3):
        federation.clients.wait_for(2)  # as long as it takes to ask
        assert federation.clients.loading == {3: "a large model"}
    assert set(federation.clients.nodes) == {0, 1}


@pytest.mark.slow
def test_site_that_was_away_at_the_end_gets_the_adapter_when_it_is_back(two, tmp_path, monkeypatch):
    monkeypatch.setattr(sites, "LEAST_S", 0.2)

    class Back(Sites):
        looks = 0

        def get_nodes(self):
            if len([1 for kind, *_ in self.seen if kind == "train"]) == 2:
                self.looks += 1
                self.away = {2} if self.looks < 4 else set()
            return super().get_nodes()

    grid = Back(two, "num_rounds=1", "strategy.final_wait_s=30")
    federation = federation_of(grid, tmp_path / "run")
    summary = federation.run(grid)
    assert grid.looks >= 4
    for config in two.values():
        kept = tmp_path / config["keep"] / "run_7" / "final" / "adapter_model.safetensors"
        assert file_sha256(kept) == summary["adapter_sha256"]
    gone = Sites(two, "num_rounds=1")
    federation = federation_of(gone, tmp_path / "second")
    monkeypatch.setattr(gone, "pull_messages", lambda names, pull=gone.pull_messages: leave(gone, pull(names)))
    federation.run(gone)
    assert [w for w in federation.progress.warnings if "client 1 (Hospital B, away) did not get the adapter" in w]


def leave(grid, replies):
    if any(reply.content.array_records for reply in replies if reply.has_content()):
        grid.away = {2}
    return replies


# --- what arrives ---------------------------------------------------------------------------------


class Runtime:
    """Flower's runtime API with one reply, object by object."""

    def __init__(self, reply):
        self.tree, self.read, self.confirmed = get_object_tree(reply), 0, []
        self.objects = {name: thing.deflate() for name, thing in get_all_nested_objects(reply).items()}
        self.metadata = SimpleNamespace(
            run_id=1, message_id=self.tree.object_id, src_node_id=5, dst_node_id=1,
            reply_to_message_id="asked", created_at=0.0,
        )  # fmt: skip

    def PullMessages(self, request):
        return SimpleNamespace(
            messages_list=[SimpleNamespace(metadata=self.metadata)], message_object_trees=[self.tree]
        )

    def PullObject(self, request):
        content = self.objects[request.object_id]
        self.read += len(content)
        return SimpleNamespace(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)


def test_reply_larger_than_it_can_be_is_not_read_to_its_end():
    identify_as_flower_task()
    arrays = ArrayRecord({"x": Array(np.zeros(20_000_000, np.float32))})  # Flower cuts it into pieces of 5 MB
    asked = Message(RecordDict(), 5, "train")
    asked.metadata.__dict__["_message_id"] = "what another was asked"  # the SuperLink knows better
    reply = Message(RecordDict({"arrays": arrays}), reply_to=asked)
    for most, whole in ((1e9, True), (10e6, False)):
        grid = HttpGrid(token="x")  # noqa: S106
        grid._client = runtime = Runtime(reply)
        [got] = pull(grid, ["asked"], most)
        assert got.metadata.reply_to_message_id == "asked"
        assert runtime.confirmed == [runtime.tree.object_id]  # the SuperLink can forget it
        if whole:
            assert got.content["arrays"]["x"].numpy().shape == (20_000_000,)
        else:
            assert "more than the 11000000 bytes" in got.error.reason
            assert runtime.read < most + SLACK_BYTES + 20e6


def test_reply_that_is_broken_or_not_whole_is_an_error_in_its_place():
    identify_as_flower_task()
    asked = Message(RecordDict(), 5, "train")
    asked.metadata.__dict__["_message_id"] = "asked"
    for found, words in ((True, "it is broken"), (False, "could not be found")):
        grid = HttpGrid(token="x")  # noqa: S106
        grid._client = runtime = Runtime(Message(RecordDict(), reply_to=asked))
        answer = SimpleNamespace(object_found=found, object_available=True, object_content=b"nonsense")
        runtime.PullObject = lambda request, answer=answer: answer
        [got] = pull(grid, ["asked"], 1e9)
        assert words in got.error.reason
        assert (got.metadata.src_node_id, got.metadata.reply_to_message_id) == (5, "asked")
        assert runtime.confirmed == [runtime.tree.object_id]


def some_arrays():
    rng = np.random.default_rng(0)
    return {
        "b": rng.standard_normal((3, 4)).astype(np.float32),
        "a": rng.standard_normal(5).astype(np.float16),
        "c": rng.integers(-9, 9, (2, 1, 2)).astype(np.int8),
        "d": np.array(2.5, np.float32),
    }


def test_folded_arrays_are_the_same_bit_for_bit_and_travel_as_one():
    content = RecordDict({"arrays": to_record(some_arrays()), "config": ConfigRecord({"x": 1})})
    known = {}
    sent = folding.folded(content, known)
    assert sum(len(record) for record in sent.array_records.values()) == 1
    assert (
        folding.folded(RecordDict(dict(content) | {"config": ConfigRecord({"x": 2})}), known)["folded"]
        is sent["folded"]
    )
    back = folding.unfolded(sent)
    assert back["config"] == content["config"]
    assert list(back["arrays"]) == list(content["arrays"])
    for name, value in some_arrays().items():
        got = back["arrays"][name].numpy()
        assert (got.dtype, got.shape, got.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert folding.unfolded(content) is content
    nothing = RecordDict({"config": ConfigRecord({"x": 1})})
    assert folding.folded(nothing) is nothing


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "O"},
        {"dtype": "F64"},
        {"shape": [3, 5]},
        {"shape": [3, 3]},
        {"shape": [-3, -4]},
        {"shape": [99999999999, 4]},
        {"data_offsets": [0, 10**12]},
        {},
    ],
)
def test_layout_that_does_not_fit_its_bytes_is_refused(wrong):
    whole = folding.folded(RecordDict({"arrays": to_record(some_arrays())}))["folded"]["bytes"].numpy().tobytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8:end]), whole[end:] if wrong else whole[end:-1]
    header["arrays/b"] |= wrong
    text = json.dumps(header).encode()
    sent = np.frombuffer(len(text).to_bytes(8, "little") + text + body, np.uint8)
    with pytest.raises(SafetensorError, match="deserializing"):
        folding.unfolded(RecordDict({"folded": ArrayRecord({"bytes": Array(sent)})}))


def test_what_a_site_says_of_itself_cannot_steer_the_terminal_or_the_log():
    class One(LocalGrid):
        def get_nodes(self):
            return [SimpleNamespace(node_id=1, public_key=b"k", name="A\x1b[31m", last_activated_at="")]

        def answer(self, message):
            message.metadata.__dict__["_message_id"] = "m"
            self.replies["m"] = Message(Error(1, "\x1b]0;owned\x07bad\nworse\x1b[2J"), reply_to=message)
            return "m"

    identify_as_flower_task()
    found = Clients(One(None, 0), 1.0, Silent())
    found.strict = False
    found.look()
    [warning] = found.progress.warnings
    assert warning.isprintable()
    assert "worse" in warning


def test_only_the_server_says_that_a_client_is_silent():
    class Claims(LocalGrid):
        def answer(self, message):
            message.metadata.__dict__["_message_id"] = "m"
            self.replies["m"] = Message(Error(SILENT, "asleep"), reply_to=message)
            return "m"

    identify_as_flower_task()
    found = Clients(Claims(None, 0), 5.0, Silent())
    found.nodes = {0: 1}
    [reply] = found.exchange([Message(RecordDict(), 1, "query.final")]).values()
    assert (reply.error.code, reply.error.reason) == (CLIENT_ERROR, "asleep")
