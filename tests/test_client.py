"""A client's round, against hand-written loops: what is trained, on what, and what stays untouched."""

import hashlib

import numpy as np
import pytest
import torch

import client
import model as adapters
from client import Task, Worker, fine_tune
from dataset import IGNORED
from learning import training
from learning.evaluation import losses_on
from tests.federation import often, small
from tests.test_model import weights_digest

NO_DROPOUT = "model.lora.lora_dropout=0.0"


def start(config, seed=0):
    lora = adapters.lora_config(config.model)
    empty = adapters.empty_model(adapters.read_config(config.model), config.model)
    return adapters.initial_adapter(adapters.adapter_shapes(empty, lora), lora, seed)


def distance(first, second) -> float:
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


@pytest.mark.parametrize("quantization", ["4", "8", "none"])
def test_training_changes_the_adapter_and_leaves_the_base_bit_identical(quantization):
    config = small(f"model.quantization={quantization}", "train.training_arguments.gradient_checkpointing=true")
    worker, adapter = Worker(config), start(config)
    before = weights_digest(worker.model)
    trained, report = fine_tune(worker, adapter, 0, Task(1, 3e-3))
    assert weights_digest(worker.model) == before
    assert all(trained[name].dtype == np.float32 for name in trained)
    moved = [name for name in trained if not np.array_equal(trained[name], adapter[name])]
    assert len(moved) == len(trained)
    assert np.isfinite(report["train_loss"])
    assert report["train_loss"] > 0


@pytest.mark.parametrize("quantization", often(["4", "8", "none"], "none"))
def test_evaluation_changes_neither_the_base_nor_later_training(quantization):
    config = small(f"model.quantization={quantization}", "dataset.holdout=0.1")
    worker, adapter = Worker(config), start(config)
    before, digest = fine_tune(worker, adapter, 0, Task(1, 3e-3))[0], weights_digest(worker.model)
    assert client.evaluate_adapter(worker, adapter, 1)
    assert weights_digest(worker.model) == digest
    assert distance(before, fine_tune(worker, adapter, 0, Task(1, 3e-3))[0]) == 0.0


@pytest.fixture(scope="module")
def worker():
    return Worker(small(NO_DROPOUT))


def test_nothing_leaks_from_one_client_to_the_next(worker):
    adapter = start(worker.config)
    first, _ = fine_tune(worker, adapter, 0, Task(1, 3e-3))
    fine_tune(worker, first, 1, Task(1, 1e-2))
    again, _ = fine_tune(worker, adapter, 0, Task(1, 3e-3))
    assert distance(first, again) == 0.0


@pytest.mark.parametrize(
    ("quantization", "loss_within", "most_within"),
    [("none", 1e-5, 1e-5), ("4", 1e-2, 1e-3)],  # in bfloat16 processors differ, and Adam amplifies small gradients
)
def test_round_equals_a_hand_written_loop(quantization, loss_within, most_within):
    worker = Worker(small(NO_DROPOUT, f"model.quantization={quantization}"))
    if quantization == "none":
        worker.model.float()
    config, adapter, steps = worker.config, start(worker.config), 2
    ours, report = fine_tune(worker, adapter, 0, Task(1, 3e-3, first_row=4))

    adapters.set_adapter(worker.model, adapter)
    weights = [weight for weight in worker.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    partition = worker.partition(0)
    order = client.fresh_rows(worker.split(0)[0], 4, steps * config.batch_size, config.seed, 0)
    losses = []
    worker.model.train()
    for step in range(steps):
        rows = [partition.row(index) for index in order[step * config.batch_size : (step + 1) * config.batch_size]]
        losses.append(whole_batch_loss(worker.model, rows))
        optimizer.zero_grad()
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    assert report["train_loss"] == pytest.approx(np.mean([loss.item() for loss in losses]), rel=loss_within)
    theirs = adapters.get_adapter(worker.model)
    close = np.concatenate([np.abs(ours[name] - theirs[name]).ravel() for name in ours])
    assert np.median(close) < most_within / 10
    assert np.mean(close < most_within) > 0.97


def whole_batch_loss(model, rows, dtype=None):
    """Mean negative log-likelihood of the response tokens, each row alone: no padding, no trainer."""
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        logits = logits.to(dtype or torch.float32)
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        tokens += int((labels != IGNORED).sum())
    return total / tokens


def test_micro_batches_give_the_gradient_of_the_whole_batch_in_float64(worker):
    model = worker.model.double()
    try:
        model.eval()
        partition = worker.partition(1)
        rows = [partition.row(index) for index in range(8)]
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in weights:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(weight.numel()))
        expected = torch.autograd.grad(whole_batch_loss(model, rows, torch.float64), weights)
        tokens = sum(label != IGNORED for row in rows for label in row["labels"])
        gradients = [torch.zeros_like(weight) for weight in weights]
        ordered = training.by_length(rows, 8)
        for start_row in range(0, 8, 2):
            inputs = training.collate(ordered[start_row : start_row + 2])
            labels = inputs.pop("labels")[:, 1:]  # trl's own loss is float32: the sum is taken here instead
            logits = model(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / tokens
            for gradient, part in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                gradient += part
        difference = max((a - b).abs().max().item() for a, b in zip(gradients, expected, strict=True))
        assert difference < 1e-9
    finally:
        client._resident.clear()
        worker.__dict__.pop("trainer")


def test_proximal_term_adds_mu_times_the_distance_to_the_gradient():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    layer = torch.nn.Module()
    layer.weight = weight
    with training.proximal_pull(layer, 0.5):
        with torch.no_grad():
            weight += torch.tensor([0.2, -0.4])  # now away from where the round began
        (3.0 * weight).sum().backward()
    assert weight.grad.tolist() == pytest.approx([3.0 + 0.5 * 0.2, 3.0 - 0.5 * 0.4])
    weight.grad = None
    (3.0 * weight).sum().backward()
    assert weight.grad.tolist() == [3.0, 3.0]


def test_strong_proximal_term_keeps_the_adapter_nearer(worker):
    adapter = start(worker.config)
    free, _ = fine_tune(worker, adapter, 0, Task(1, 1e-3))
    held, _ = fine_tune(worker, adapter, 0, Task(1, 1e-3, proximal_mu=1e4))
    assert sum(np.square(held[n] - adapter[n]).sum() for n in held) < sum(
        np.square(free[n] - adapter[n]).sum() for n in free
    )


def test_padding_and_prompt_carry_no_loss_and_right_padding_needs_no_mask(worker):
    rows = [worker.partition(0).row(index) for index in range(4)]
    batch = training.collate(rows)
    for row, labels in zip(rows, batch["labels"].tolist(), strict=True):
        assert labels[: len(row["labels"])] == row["labels"]
        assert set(labels[len(row["labels"]) :]) <= {IGNORED}
    loss, right, tokens = losses_on(worker.model.eval(), rows, 2048).sum(0)
    assert tokens == sum(label != IGNORED for row in rows for label in row["labels"])
    with torch.no_grad():
        assert loss / tokens == pytest.approx(whole_batch_loss(worker.model.eval(), rows).item(), rel=5e-3)
    assert 0 <= right <= tokens


def test_batches_are_sorted_longest_first_and_keep_their_rows():
    rows = [{"input_ids": [0] * length, "labels": [0] * length} for length in (3, 9, 5, 2, 8, 4)]
    lengths = [len(row["input_ids"]) for row in training.by_length(rows, 3)]
    assert lengths == [9, 5, 3, 8, 4, 2]


def test_client_without_one_response_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "x", "input": "", "output": ""}\n' * 8)
    worker = Worker(small(f"dataset.name={tmp_path / 'a.jsonl'}"))
    with pytest.raises(ValueError, match="client 2: none of its 2 rows has a response"):
        fine_tune(worker, start(worker.config), 2, Task(1, 1e-3))


def test_partition_is_tokenized_once_for_all_workers_of_a_run(tmp_path):
    config = small()
    first, second = Worker(config, tmp_path), Worker(config, tmp_path)
    for worker in (first, second, first):
        worker.partition(0)
    assert (first.counts["tokenizations"], second.counts["tokenizations"]) == (1, 0)
    np.testing.assert_array_equal(first.partition(0).ids, second.partition(0).ids)


def test_worker_is_kept_for_the_same_settings_and_replaced_for_others():
    client._resident.clear()
    kept = client.resident_worker(client.Site(small()))
    assert client.resident_worker(client.Site(small())) is kept
    assert client.resident_worker(client.Site(small("seed=1"))) is not kept
    assert len(client._resident) == 1


def test_adapter_bits_do_not_depend_on_the_process_seed(worker):
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        dropping = Worker(small("model.lora.lora_dropout=0.3"))
        trained, _ = fine_tune(dropping, start(dropping.config), 0, Task(1, 3e-3))
        digests.add(hashlib.sha256(b"".join(trained[name].tobytes() for name in sorted(trained))).hexdigest())
    assert len(digests) == 1
