"""How adapters travel: sizes, rounding errors, refusals; and a federation over each form."""

import re

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import FedAvg

import client
from client import Site, client_app
from exchange import transfer
from exchange.transfer import to_record
from settings.schema import RunError
from tests.federation import LocalGrid, make_federation, often, run_locally, small
from tests.test_strategy import Sabotage


def lora_like(seed: int, scale: float = 1e-3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"a.lora_A": (8, 64), "a.lora_B": (96, 8), "a.magnitude": (64,)}
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("form", "error"), [("fp32", 0.0), ("fp16", 3e-4), ("int8", 0.012)])
def test_difference_comes_back_as_exact_as_its_form_allows(form, error):
    known = lora_like(0, scale=0.05)
    adapter = {name: value + change for (name, value), change in zip(known.items(), lora_like(1).values(), strict=True)}
    back = transfer.decode(transfer.encode(adapter, known, form), known, form)
    for name, value in adapter.items():
        change, returned = value - known[name], back[name] - known[name]
        assert back[name].dtype == np.float32
        assert np.linalg.norm(returned - change) <= error * np.linalg.norm(change)


def test_int8_keeps_the_largest_entry_of_each_rank_and_nothing_of_no_change():
    known = {"b": np.zeros((3, 2), np.float32)}
    adapter = {"b": np.array([[1.0, 0.001], [0.5, -0.004], [-0.25, 0.0]], np.float32)}
    sent = transfer.encode(adapter, known, "int8")
    np.testing.assert_allclose(sent["scales"], [1 / 127, 0.004 / 127], rtol=1e-6)
    assert sent["values"].tolist() == [127, 32, 64, -127, -32, 0]  # 31.75 and 63.5 and -31.75, to the nearest
    nothing = transfer.encode(known, known, "int8")
    np.testing.assert_array_equal(transfer.decode(nothing, known, "int8")["b"], known["b"])


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e6])
def test_fp16_keeps_differences_that_float16_itself_could_not_hold(size):
    known = {name: np.zeros_like(value) for name, value in lora_like(0).items()}
    adapter = lora_like(1, scale=size)
    back = transfer.decode(transfer.encode(adapter, known, "fp16"), known, "fp16")
    for name, value in adapter.items():
        assert np.linalg.norm(back[name] - value) <= 3e-4 * np.linalg.norm(value)


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_does_not_become_finite(form):
    known = lora_like(0)
    adapter = {name: value.copy() for name, value in known.items()}
    adapter["a.lora_A"][2, 3], adapter["a.lora_B"][1, 1] = np.nan, np.inf
    back = transfer.decode(transfer.encode(adapter, known, form), known, form)
    assert not np.isfinite(back["a.lora_A"]).all()
    assert not np.isfinite(back["a.lora_B"]).all()


@pytest.mark.parametrize(
    ("form", "arrays", "reason"),
    [
        ("int8", {"values": np.zeros(1344, np.int8)}, "other arrays than scales, values"),
        ("int8", {"values": np.zeros(9, np.int8), "scales": np.zeros(17, np.float32)}, "values is int8 (9,)"),
        ("int8", {"values": np.zeros(1344, np.int8), "scales": np.zeros(17)}, "scales is float64"),
        (
            "fp16",
            dict(values=np.zeros(1344), scales=np.zeros(17, np.float32)),
            "values is float64 (1344,), not float16",
        ),
        ("fp16", {"values": np.zeros(1344, np.float16), "x": np.zeros(1)}, "other arrays than scales, values"),
    ],
)
def test_arrays_that_are_no_difference_are_refused(form, arrays, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        transfer.decode(arrays, lora_like(0), form)


SHARE = {"fp16": 0.51, "int8": 0.26}


WHOLE = ["model.lora.r=16", "model.lora.target_modules=all-linear"]


@pytest.fixture(scope="module")
def exact_run(tmp_path_factory):
    return run_locally(small(*WHOLE), tmp_path_factory.mktemp("fp32") / "run")


@pytest.mark.parametrize("form", often(SHARE, "int8"))
def test_federation_sends_less_and_learns_the_same(form, exact_run, tmp_path):
    exact, reference = exact_run
    federation, summary = run_locally(small(*WHOLE, f"transfer={form}"), tmp_path)
    for direction in ("bytes_down", "bytes_up"):
        assert summary[direction] <= SHARE[form] * reference[direction]
    initial = federation.codec.initial
    moved = np.concatenate([(exact.record.state.adapter[name] - initial[name]).ravel() for name in initial])
    apart = np.concatenate(
        [(federation.record.state.adapter[name] - exact.record.state.adapter[name]).ravel() for name in initial]
    )
    assert 0 < np.linalg.norm(apart) < 0.1 * np.linalg.norm(moved)
    assert abs(summary["final_train_loss"] - reference["final_train_loss"]) < 0.02


def test_dora_starts_from_the_same_magnitudes_on_both_sides(tmp_path):
    config = small("model.lora.use_dora=true", "transfer=int8")
    first, summary = run_locally(config, tmp_path / "first")
    assert any("magnitude" in name for name in first.codec.initial)
    [worker] = client._resident.values()
    second = make_federation(config, tmp_path / "second")  # on the same worker, which has trained since
    again = second.run(LocalGrid(client_app(Site(config)), config.num_clients))
    assert client._resident == {next(iter(client._resident)): worker}
    for name, value in worker.initial.items():
        np.testing.assert_array_equal(value, first.codec.initial[name])
        np.testing.assert_array_equal(value, second.codec.initial[name])
    assert again["adapter_sha256"] == summary["adapter_sha256"]


def test_reply_that_is_no_difference_is_left_out_by_name(tmp_path):
    def torn(message, reply):
        reply.content["arrays"].pop("scales")
        return reply

    config = small("strategy.fraction_fit=1.0", "num_rounds=1", "transfer=int8")
    federation, _ = run_locally(config, tmp_path, Sabotage(client_app(Site(config)), {2}, torn))
    assert federation.progress.rounds[0]["clients"] == [0, 1, 3]
    assert "client 2 is left out: its adapter cannot be read: holds other arrays" in federation.progress.warnings[0]


@pytest.mark.slow
def test_evaluation_works_over_every_form(tmp_path):
    config = small("transfer=fp16", "dataset.holdout=0.1", "strategy.fraction_evaluate=0.5", "num_rounds=1")
    federation, summary = run_locally(config, tmp_path)
    assert federation.progress.rounds[0]["held_out"]["clients"]["loss"] > 0
    shapes = {name: value.shape for name, value in federation.codec.initial.items()}
    assert summary["bytes_up"] == 2 * transfer.payload_bytes(shapes, "fp16")
    assert summary["bytes_down"] == 3 * summary["bytes_up"]  # two clients train, two evaluate before and two after


def test_client_that_starts_from_another_adapter_says_so(tmp_path, monkeypatch):
    other = property(lambda worker: lora_like(3))
    monkeypatch.setattr(client.Worker, "initial", other)
    with pytest.raises(RunError, match="this client makes another initial adapter than the server"):
        run_locally(small("transfer=int8", "num_rounds=1"), tmp_path)


class ToEachItsOwn(FedAvg):
    """Sends every client an adapter of its own, as personalising strategies do."""

    def configure_train(self, server_round, arrays, config, grid):
        for position, message in enumerate(super().configure_train(server_round, arrays, config, grid)):
            content = RecordDict(dict(message.content))
            content["arrays"] = to_record({k: v.numpy() + np.float32(position) for k, v in arrays.items()})
            yield Message(content, message.metadata.dst_node_id, message.metadata.message_type)


def test_reply_is_added_to_what_its_own_client_was_sent(tmp_path):
    """The clients do not train at all here, so each returns what it received: the mean lies half a step above."""
    unchanged = small("strategy._target_=tests.test_transfer.ToEachItsOwn", "transfer=fp16", "num_rounds=1",
                      "train.learning_rate_max=1e-30", "train.learning_rate_min=0")  # fmt: skip
    federation, _ = run_locally(unchanged, tmp_path)
    for name, value in federation.record.state.adapter.items():
        np.testing.assert_allclose(value, federation.codec.initial[name] + 0.5, atol=1e-6)
