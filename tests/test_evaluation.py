"""Does it help? Held-out rows stay out, the numbers are right, and a run ends where they say."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from transformers import LlamaConfig
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import client
import model as adapters
import test as cli
from client import GLOBAL_SET, Site, Worker, client_app, evaluate_adapter
from dataset import IGNORED, load_rows
from exchange.guard import check_scores
from exchange.scores import figures
from learning import evaluation, training
from learning.answering import Answerer
from learning.evaluation import HeldOut, score
from learning.memory import sizes
from model import read_config
from runs import checkpoint, runfolder
from server import federation as strategy
from server.plan import check_inputs, traffic
from settings.resume import read_settings
from settings.schema import RunError, SettingsError
from tests.federation import Clients, LocalGrid, make_federation, outcome, play, run_locally, small
from tests.test_client import start
from utils import read_json_lines

HELD_OUT = "dataset.eval_name=quickstart/data/heldout.jsonl"


# --- the numbers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    """A worker whose model computes in float32, and eight held-out rows."""
    worker = Worker(small(HELD_OUT))
    worker.model.float()
    data = worker.held_out(GLOBAL_SET)
    return worker, HeldOut(data.rows[:8], data.outputs[:8], data.categories[:8])


def test_loss_and_perplexity_equal_a_direct_computation(exact):
    worker, data = exact
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for row in data.rows:  # one by one, without padding
            logits = worker.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            for place, label in enumerate(row["labels"]):
                if label != IGNORED:
                    total -= torch.log_softmax(logits[place - 1], 0)[label].item()
                    right += int(logits[place - 1].argmax()) == label
                    count += 1
    found = figures(score(worker.model, worker.tokenizer, data, tokens_at_once=600))
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["token_accuracy"] == right / count
    assert found["tokens"] == count


class Next(torch.nn.Module):
    """A model that expects after every token the one with the next number, with a probability of one half."""

    device, dtype = torch.device("cpu"), torch.float32
    config = LlamaConfig(vocab_size=12, hidden_size=1, num_attention_heads=1)

    def __init__(self):
        super().__init__()
        self.base_model = Numbers()

    def forward(self, use_cache):
        numbers = self.base_model().last_hidden_state
        logits = torch.full((*numbers.shape[:2], 12), math.log(0.5 / 11))
        return CausalLMOutput(logits=logits.scatter_(-1, numbers.long() + 1, math.log(0.5)))


class Numbers(torch.nn.Module):
    """Its decoder, whose hidden states are the tokens."""

    def forward(self, input_ids, use_cache):
        return BaseModelOutput(last_hidden_state=input_ids[..., None].float())


class Spelled:
    """A tokenizer whose tokens are letters: 1 is a, 2 is b."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens):
        return "".join(" abcdefghij"[token] for token in ids)


def row(prompt, response):
    return {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}


def test_counts_equal_hand_counts(monkeypatch):
    data = HeldOut(
        rows=[row([1, 2], [3, 4, 0]), row([5], [6, 0]), row([1], [9])],
        outputs=["the cat sat", "yes", "Ja"],
        categories=["long", "short", "short"],
    )
    answers = {(1, 2): "the cat", (5,): "yes", (1,): "ja"}
    texts = iter(answers[tuple(prompt)] for prompt in asked_in(data))
    monkeypatch.setattr(evaluation, "generate", lambda model, tokenizer, prompts, longest, most: [[]] * len(prompts))
    monkeypatch.setattr(Spelled, "decode", lambda *_, **__: next(texts))
    found = figures(score(Next(), Spelled(), data, tokens_at_once=8, answers=3))
    # after 2 comes 3, right; after 3 comes 4, right; after 4 comes 0, wrong; after 5 comes 6, right; then 0; 9 after 1
    assert (found["tokens"], found["token_accuracy"]) == (6, 3 / 6)
    assert found["loss"] == pytest.approx((3 * math.log(2) + 3 * math.log(22)) / 6)
    # "yes" is exact, "ja" is not "Ja"; ROUGE-L: 2 * 1 * 2/3 / (1 + 2/3) = 0.8, 1 and, small letters alike, 1
    assert (found["exact_match"], found["answers"]) == (1 / 3, 3)
    assert found["rouge_l"] == pytest.approx((0.8 + 1 + 1) / 3)
    assert found["by_category"]["long"]["token_accuracy"] == 2 / 3
    assert found["by_category"]["short"]["exact_match"] == 1 / 2


def asked_in(data):
    """The prompts in the order in which `score` asks them."""
    order = evaluation.generator("answers", len(data.rows)).choice(len(data.rows), len(data.rows), replace=False)
    return [evaluation.prompt_of(data.rows[index]) for index in order]


@pytest.mark.parametrize(
    ("right", "answer", "expected"),
    [
        ("a b c d", "a c d", 2 * 1 * 0.75 / 1.75),
        ("Paris.", "paris", 1.0),
        ("東京都", "東京", 2 * 1 * (2 / 3) / (5 / 3)),
        ("größer", "größer", 1.0),
        ("cafe\u0301 noir", "caf\u00e9 au lait", 2 * (1 / 2) * (1 / 3) / (5 / 6)),  # NFD and NFC
        ("ที่นี่", "ที่นั่น", 2 * (1 / 2) * (1 / 3) / (5 / 6)),  # two syllables' letters with their marks, and three
        ("مَرْحَبًا يا عالَم", "مَرْحَبًا", 2 * (1 / 3) / (4 / 3)),  # words with their harakat
        ("हिन्दी में", "हिन्दी", 2 * (1 / 2) / (3 / 2)),
        ("yes", "", 0.0),
    ],
)
def test_rouge_l_equals_hand_counts_in_any_script(right, answer, expected):
    assert evaluation.rouge_l(right, answer) == pytest.approx(expected)


def test_answers_are_exact_however_their_accents_are_encoded():
    assert evaluation.is_same("Caf\u00e9", "Cafe\u0301")
    assert evaluation.is_same("\uac00", "\u1100\u1161")  # Hangul
    assert not evaluation.is_same("Cafe", "Caf\u00e9")
    assert not evaluation.is_same("مرحبا", "مَرْحَبًا")


def test_greedy_answers_stop_at_eos_and_do_not_depend_on_the_batch(exact):
    worker, data = exact
    prompts = [evaluation.prompt_of(row) for row in data.rows]
    together = evaluation.generate(worker.model.eval(), worker.tokenizer, prompts, 12, 300)
    alone = [evaluation.generate(worker.model, worker.tokenizer, [prompt], 12, 300)[0] for prompt in prompts]
    assert together == alone
    assert all(worker.tokenizer.eos_token_id not in ids and len(ids) <= 12 for ids in together)


def with_categories(rows, values):
    """The same rows, with other values in their column `category`."""
    return dataclasses.replace(rows, table=rows.table.remove_columns("category").add_column("category", values))


def test_categories_add_up_and_too_many_count_as_none(exact):
    worker, data = exact
    found = figures(score(worker.model, worker.tokenizer, data, 2048))
    parts = found["by_category"].values()
    assert len(parts) > 1
    assert sum(part["tokens"] for part in parts) == found["tokens"]
    mean = sum(part["loss"] * part["tokens"] for part in parts) / found["tokens"]
    assert mean == pytest.approx(found["loss"])
    partition = worker.partition(GLOBAL_SET)
    raw = with_categories(worker.eval_rows, [str(number) for number in range(203)])
    assert set(evaluation.held_out(partition, np.arange(203), raw, "category").categories) == {""}
    assert set(evaluation.held_out(partition, np.arange(203), raw, "no such column").categories) == {""}


# --- what is held out -----------------------------------------------------------------------------


def test_held_out_rows_never_reach_training(tmp_path, monkeypatch):
    rows = [
        {"instruction": f"Repeat {number % 30}.", "input": "", "output": str(number % 30), "category": "x"}
        for number in range(100)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = {}
    original = client.fine_tune

    def watched(worker, adapter, partition_id, task):
        monkeypatch.setattr(client, "by_length", lambda rows, size: remember(partition_id, rows, size))
        return original(worker, adapter, partition_id, task)

    def remember(partition_id, rows, size):
        trained.setdefault(partition_id, set()).update(tuple(row["input_ids"]) for row in rows)
        return training.by_length(rows, size)

    monkeypatch.setattr(client, "fine_tune", watched)
    config = small(
        f"dataset.name={file}", "dataset.holdout=0.2", "strategy.fraction_evaluate=1.0", "strategy.fraction_fit=1.0",
        "num_rounds=1", "train.training_arguments.max_steps=5",
    )  # fmt: skip
    federation, _ = run_locally(config, tmp_path / "run")
    worker = Worker(config)
    assert set(trained) == {0, 1, 2, 3}
    for partition_id, seen in trained.items():
        held = {tuple(row["input_ids"]) for row in worker.held_out(partition_id).rows}
        every = {tuple(worker.partition(partition_id).row(i)["input_ids"]) for i in range(25)}
        assert held
        assert not held & seen
        assert held | seen == every
    tokens = federation.progress.rounds[0]["held_out"]["clients"]["tokens"]
    held_out = [row for partition_id in trained for row in worker.held_out(partition_id).rows]
    assert tokens == sum(label != IGNORED for row in held_out for label in row["labels"])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A held-out set of 14 rows, two of each category."""
    lines = Path("quickstart/data/heldout.jsonl").read_text().splitlines(keepends=True)
    lines.sort(key=lambda line: json.loads(line)["category"])
    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    file.write_text("".join(lines[0::29] + lines[1::29]))
    return f"dataset.eval_name={file}"


@pytest.mark.parametrize("quantization", ["4", pytest.param("none", marks=pytest.mark.slow)])
def test_run_is_bit_identical_with_and_without_evaluation(quantization, few, tmp_path):
    same = [
        "dataset.holdout=0.1", "model.lora.lora_dropout=0.2", f"model.quantization={quantization}", "num_rounds=2"
    ]  # fmt: skip
    measuring = [
        few, "strategy.fraction_evaluate=0.5", "evaluate.every_rounds=1", "evaluate.answers=3",
        "evaluate.max_new_tokens=4",
    ]  # fmt: skip
    runs = [run_locally(small(*same, *more), tmp_path / str(len(more))) for more in ([], measuring)]
    assert runs[0][1]["adapter_sha256"] == runs[1][1]["adapter_sha256"]
    lines = [
        [(line["train_loss"], line["clients"], line["rows"]) for line in federation.record.metrics]
        for federation, _ in runs
    ]
    assert lines[0] == lines[1]
    assert "held_out" not in runs[0][0].record.metrics[0]
    assert set(runs[1][0].record.metrics[0]["held_out"]) == {"global", "clients"}
    assert runs[1][0].record.metrics[0]["held_out"]["global"]["answers"] == 3


@pytest.mark.slow
def test_global_set_is_evaluated_in_turn_by_one_client_and_by_nobody_else(few, tmp_path):
    asked = []

    class Watched(LocalGrid):
        def answer(self, message):
            if message.metadata.message_type == "evaluate":
                config = message.content["config"]
                asked.append((config["server-round"], config["rows"]))
            return super().answer(message)

    config = small(few, "num_rounds=5", "evaluate.every_rounds=2", "train.training_arguments.max_steps=1")
    client._resident.clear()
    federation = make_federation(config, tmp_path)
    federation.run(Watched(client_app(Site(config)), 4))
    assert asked == [(0, "global"), (2, "global"), (4, "global"), (5, "global")]
    size = federation.budget.payload_bytes
    assert [line["bytes_down"] // size for line in federation.record.metrics] == [
        3,
        3,
        2,
        3,
        3,
    ]  # two train; one evaluates
    assert all(line["bytes_down"] % size == 0 for line in federation.record.metrics)
    worker = Worker(config)
    direct = figures(evaluate_adapter(worker, federation.record.state.adapter, GLOBAL_SET))
    assert federation.record.metrics[-1]["held_out"]["global"] == direct
    assert federation.record.metrics[-1]["held_out"]["global"]["by_category"].keys() == {
        "arithmetic", "compare", "count", "extract", "opinion", "pick", "sort"
    }  # fmt: skip
    before = figures(evaluate_adapter(worker, start(config), GLOBAL_SET))
    assert federation.record.metrics[0]["held_out_before"]["global"] == before


def failing(times):
    """Clients whose first `times` evaluations fail."""
    left = [times]

    def bad(partition, number, reply):
        if "scores" in reply.content.metric_records and left[0]:
            left[0] -= 1
            raise RuntimeError("no disk")
        return reply

    return bad


@pytest.mark.parametrize(("times", "measured"), [(2, True), (3, False)])
def test_another_client_evaluates_when_one_fails(times, measured, tmp_path):
    config = small(HELD_OUT, "num_rounds=1")
    clients = Clients(config, losses={0: 2.0, 1: 1.0})
    bad = failing(times)

    def app(message, context):
        from flwr.app import Error

        try:
            clients.bad = bad
            return clients(message, context)
        except RuntimeError as error:
            return Message(Error(1, f"Traceback\n{error}"), reply_to=message)

    client._resident.clear()
    federation = make_federation(config, tmp_path)
    clients.initial = federation.codec.initial
    federation.run(LocalGrid(app, 4))
    assert ("held_out_before" in federation.record.metrics[0]) == measured
    assert len(federation.progress.warnings) == times
    assert all(text.endswith("could not evaluate: no disk") for text in federation.progress.warnings)
    assert federation.record.metrics[0]["held_out"]["global"]["loss"] == 1.0


GOOD = [2.0, 1.0, 3.0, 1.0, 1.5, 2.0]  # in the order of exchange.scores.FIELDS


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        ({"": GOOD}, None),
        ({}, None),
        ({"": GOOD[:5]}, "does not report exactly"),
        ({"": [math.nan, *GOOD[1:]]}, "no usable numbers"),
        ({"": [-1.0, *GOOD[1:]]}, "no usable numbers"),
        ({"": [2.0, 4.0, *GOOD[2:]]}, "no usable numbers"),
        ({"": [2.0, 0.0, 0.0, *GOOD[3:]]}, "no usable numbers"),
        ({"": [2.0, 1.0, 2.5, *GOOD[3:]]}, "no usable numbers"),
        ({"": [*GOOD[:3], 3.0, 1.5, 2.0]}, "no usable numbers"),
        ({"": [*GOOD[:5], math.inf]}, "no usable numbers"),
        ({"x" * 300: GOOD}, "does not report exactly"),
        ({"": GOOD, "more": [0.0, 0.0, 1e12, 0.0, 0.0, 0.0]}, "1e+12 tokens, which cannot be"),
        ({str(number): GOOD for number in range(200)}, "up to 100 categories"),
        (None, "does not report scores"),
    ],
)
def test_scores_that_can_not_be_are_refused(scores, fault):
    strategy.identify = None
    message = Message(RecordDict(), 1, "evaluate")
    message.metadata.__dict__["_message_id"] = "question"
    content = RecordDict({} if scores is None else {"scores": MetricRecord(scores)})
    found = check_scores(Message(content, reply_to=message), most=100)
    assert found is None if fault is None else fault in str(found)


def test_rows_that_are_trained_on_too_are_counted(tmp_path):
    own = load_rows(small().dataset).table.select(range(3)).to_list() + [
        {"instruction": "new", "input": "", "output": "x"}
    ]
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in own))
    facts = check_inputs(small(f"dataset.eval_name={file}")).data
    assert facts["held_out"]["also_trained_on"] == 3
    assert check_inputs(small(HELD_OUT)).data["held_out"]["also_trained_on"] == 0
    file.write_text('{"question": "x"}')
    with pytest.raises(SettingsError, match=r"^dataset.eval_name=.*: has no columns that make a row"):
        check_inputs(small(f"dataset.eval_name={file}"))
    file.write_text('{"instruction": "x", "input": "", "output": " "}')
    with pytest.raises(SettingsError, match=r"^dataset.eval_name=.*: none of its rows has an output"):
        check_inputs(small(f"dataset.eval_name={file}"))


# --- best, early stop, budget ---------------------------------------------------------------------

TEN = ["num_rounds=10", "train.save_every_round=5", HELD_OUT, "evaluate.every_rounds=1"]


def losses(*values):
    return dict(enumerate(values))


def measured(folder):
    return json.loads((folder / "results.json").read_text())


def test_best_points_to_the_checkpoint_with_the_lowest_held_out_loss(tmp_path):
    config = small(*TEN)
    play(config, tmp_path, Clients(config, losses=losses(9, 5, 4, 3, 3.5, 3.4, 6, 2, 7, 8, 9)))
    assert (tmp_path / "best").readlink().name == "peft_7"
    assert runfolder.rounds_in(tmp_path) == [10, 7, 5]  # 1, 2 and 3 were best for a while
    assert json.loads((tmp_path / "best" / "state.json").read_text())["round"] == 7
    found = measured(tmp_path)
    assert (found["best_round"], found["best_held_out_loss"]) == (7, 2)
    assert (found["held_out_loss_before"], found["held_out_loss"], found["ended"]) == (9, 9, None)
    assert found["bytes_per_point"] is None  # nothing was gained at the end


@pytest.mark.slow
def test_early_stop_ends_where_a_hand_calculation_says(tmp_path):
    # lowest after round 3, then 4, 5, 6: three rounds without a lower one
    config = small(*TEN, "train.early_stop_rounds=3")
    values = losses(9, 5, 4, 3, 3.5, 3.1, 3.0, 2, 7, 8, 9)
    play(config, tmp_path / "a", Clients(config, losses=values))
    found = measured(tmp_path / "a")
    assert found["rounds"] == 6
    assert found["ended"] == "train.early_stop_rounds=3: the held-out loss was lowest after round 3"
    assert runfolder.rounds_in(tmp_path / "a") == [6, 5, 3]
    assert (tmp_path / "a" / "best").readlink().name == "peft_3"
    sent = sum(line["bytes_down"] + line["bytes_up"] for line in read_json_lines(tmp_path / "a" / "metrics.jsonl"))
    assert found["bytes_per_point"] == sent / (9 - 3)
    with pytest.raises(RuntimeError, match="stopped"):  # interrupted, it ends at the same place
        play(config, tmp_path / "b", Clients(config, stop_in(5), losses=values))
    play(config, tmp_path / "b", Clients(config, losses=values), resumes=True)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_checkpoints_that_were_the_best_for_a_while_go_after_a_resume_too(tmp_path):
    config, values = small(*TEN), losses(9, 5, 4, 3, 3.5, 2, 6, 1, 7, 8, 9)
    for stopped_in in (3, 5):  # rounds 2 and 4 are written; 2 was the best until then, 4 was not
        with pytest.raises(RuntimeError, match="stopped"):
            play(config, tmp_path, Clients(config, stop_in(stopped_in), losses=values), resumes=stopped_in > 3)
    play(config, tmp_path, Clients(config, losses=values), resumes=True)
    assert runfolder.rounds_in(tmp_path) == [10, 7, 5, 4]


def test_checkpoints_that_were_in_turn_stay_when_a_resume_changes_whose_turn_it_is(tmp_path):
    values = losses(9, 8, 7, 6, 5, 4, 3)
    every = {
        n: small("num_rounds=6", f"train.save_every_round={n}", HELD_OUT, "evaluate.every_rounds=1") for n in (2, 5)
    }
    with pytest.raises(RuntimeError, match="stopped"):
        play(every[2], tmp_path, Clients(every[2], stop_in(4), losses=values))
    assert runfolder.rounds_in(tmp_path) == [3, 2]
    play(every[5], tmp_path, Clients(every[5], losses=values), resumes=True)
    assert runfolder.rounds_in(tmp_path) == [6, 5, 2]  # 3 and 4 were only the best for a while


def stop_in(number):
    def bad(partition, current, reply):
        if current == number:
            raise RuntimeError("stopped")
        return reply

    return bad


def test_early_stop_counts_rounds_between_evaluations_too(tmp_path):
    # evaluated after 0, 3, 6, 9, 10: lowest after 3; after 6 that is 3 rounds ago, after 9 it is 6
    config = small(*TEN, "train.early_stop_rounds=4", "evaluate.every_rounds=3")
    play(config, tmp_path, Clients(config, losses={0: 2.0, 3: 1.0, 6: 1.5, 9: 1.2, 10: 0.1}))
    assert measured(tmp_path)["rounds"] == 9


def test_run_that_never_beats_the_base_model_stops_and_says_so(tmp_path):
    config = small(*TEN, "train.early_stop_rounds=2")
    play(config, tmp_path, Clients(config, losses=losses(1, 2, 3, 4)))
    found = measured(tmp_path)
    assert found["ended"] == "train.early_stop_rounds=2: the held-out loss was lowest before the first round"
    assert (found["rounds"], found["best_round"], found["best_held_out_loss"]) == (2, 1, 2)
    assert (tmp_path / "best").readlink().name == "peft_1"  # of the checkpoints the best


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_budget_ends_the_run_before_the_round_that_would_exceed_it(form, tmp_path):
    config = small("num_rounds=10", f"transfer={form}")
    size = make_federation(config, tmp_path / "none").budget.payload_bytes
    for most, rounds in ((12 * size, 3), (12 * size - 1, 2), (15.9 * size, 3), (16 * size, 4)):  # 2 clients, both ways
        limited = small("num_rounds=10", f"transfer={form}", f"strategy.max_bytes={most}")
        federation = play(limited, tmp_path / str(most))
        found = measured(tmp_path / str(most))
        assert found["rounds"] == rounds
        assert found["bytes_down"] + found["bytes_up"] == 4 * rounds * size <= most
        assert found["ended"].startswith(f"strategy.max_bytes={most:.10g}: ")
        assert runfolder.rounds_in(tmp_path / str(most))[0] == rounds
        assert (
            traffic(limited, sizes(read_config(limited.model), limited))[0] == rounds
        )  # the dry run knows it beforehand
        assert federation.record.state.round_number == rounds


def test_budget_counts_evaluations_and_retries(tmp_path):
    """A round is 2 x 2 adapters and one to evaluate, every second round and before the first: 1 + 4 + 5 + 4 + 5."""
    settings = ["num_rounds=10", HELD_OUT, "evaluate.every_rounds=2"]
    size = make_federation(small(*settings), tmp_path / "none").budget.payload_bytes
    config = small(*settings, f"strategy.max_bytes={18 * size}")
    play(config, tmp_path / "a", Clients(config, losses=dict.fromkeys(range(11), 1.0)))
    assert measured(tmp_path / "a")["rounds"] == 3  # 14; the fourth would make 19
    broken = Clients(config, losses=dict.fromkeys(range(11), 1.0))

    def bad(partition, number, reply):  # in round 2 nobody is good: the 2 x 2 are spent, 2 x 2 more are not
        if number == 2 and "arrays" in reply.content.array_records:
            reply.content.metric_records["metrics"]["train_loss"] = math.nan
        return reply

    broken.bad = bad
    tight = small(*settings, f"strategy.max_bytes={12 * size}")
    play(tight, tmp_path / "b", broken)
    assert measured(tmp_path / "b")["rounds"] == 1
    found = measured(tmp_path / "b")
    assert found["bytes_down"] + found["bytes_up"] == 9 * size  # 1 + 4, and 4 that were spent in vain
    again = play(tight, tmp_path / "b", resumes=True)  # and they still count in a process that goes on
    assert again.record.state.round_number == 1
    assert measured(tmp_path / "b")["bytes_down"] == found["bytes_down"]


def test_last_adapter_of_a_budget_is_measured_if_there_is_room(tmp_path):
    settings = ["num_rounds=10", HELD_OUT, "evaluate.every_rounds=4"]
    size = make_federation(small(*settings), tmp_path / "none").budget.payload_bytes
    for most, measured_round in ((14, 3), (13, 0)):  # 1 + 4 + 4 + 4, and one more to measure
        config = small(*settings, f"strategy.max_bytes={most * size}")
        play(config, tmp_path / str(most), Clients(config, losses=losses(9, 8, 7, 6)))
        found = measured(tmp_path / str(most))
        assert (found["rounds"], found["held_out_round"]) == (3, measured_round)
        assert found["bytes_down"] + found["bytes_up"] == most * size
        assert traffic(config, sizes(read_config(config.model), config)) == (3, most - 6, 6)


def test_resumed_dora_run_sends_and_ends_like_a_whole_one(tmp_path):
    settings = ["num_rounds=4", "model.lora.use_dora=true", "train.save_every_round=1"]
    size = make_federation(small(*settings), tmp_path / "none").budget.payload_bytes
    config = small(*settings, f"strategy.max_bytes={13 * size}")  # one before the first round, four in each
    play(config, tmp_path / "whole")
    assert measured(tmp_path / "whole")["rounds"] == 3
    assert traffic(config, sizes(read_config(config.model), config))[0] == 3
    with pytest.raises(RuntimeError, match="stopped"):
        play(config, tmp_path / "torn", Clients(config, stop_in(2)))
    play(config, tmp_path / "torn", resumes=True)
    assert outcome(tmp_path / "torn") == outcome(tmp_path / "whole")


def test_client_can_not_weigh_more_than_its_rows_or_change_the_global_set(tmp_path):
    def boast(partition, number, reply):
        if "scores" in reply.content.metric_records and partition == 0:
            reply.content.metric_records["scores"][""] = [0.0, 0.0, 1e9, 0.0, 0.0, 0.0]
        return reply

    config = small("num_rounds=2", "dataset.holdout=0.1", "strategy.fraction_evaluate=1.0")
    federation = play(config, tmp_path / "own", Clients(config, boast, losses=losses(3, 2, 1)))
    assert federation.record.metrics[1]["held_out"]["clients"]["loss"] == 1.0
    assert federation.record.metrics[1]["held_out"]["clients"]["clients"] == [1, 2, 3]

    def change(partition, number, reply):
        if "scores" in reply.content.metric_records and number == 2:
            reply.content.metric_records["scores"][""] = [0.0, 0.0, 11.0, 0.0, 0.0, 0.0]
        return reply

    config = small("num_rounds=2", HELD_OUT, "evaluate.every_rounds=1")
    federation = play(config, tmp_path / "global", Clients(config, change, losses=losses(3, 2, 1)))
    assert "held_out" not in federation.record.metrics[1]
    assert "its scores are of 11 tokens, which cannot be" in federation.progress.warnings[0]


def test_more_clients_than_expected_do_not_evaluate_more(tmp_path):
    config = small(HELD_OUT, "num_rounds=1")
    client._resident.clear()
    federation, clients = make_federation(config, tmp_path), Clients(config, losses=losses(2, 1))
    federation.run(LocalGrid(clients, 12))
    assert federation.record.metrics[0]["held_out"]["global"]["tokens"] == 10
    down = federation.record.metrics[0]["bytes_down"] // federation.budget.payload_bytes
    assert down == 6 + 2  # half of twelve train; one evaluates before, one after


def test_run_whose_loss_is_no_number_any_more_stops_early_too(tmp_path):
    config = small(*TEN, "train.early_stop_rounds=2")
    values = losses(9, 8, *[math.nan] * 9)
    play(config, tmp_path, Clients(config, losses=values))
    assert measured(tmp_path)["rounds"] == 3


def test_budget_below_one_round_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"^strategy.max_bytes=1000: use at least the \d+ bytes of the first round"):
        make_federation(small("strategy.max_bytes=1000"), tmp_path)


def test_run_that_was_ended_early_goes_on_when_there_is_more_room(tmp_path):
    size = make_federation(small(), tmp_path / "none").budget.payload_bytes
    less, more = (small("num_rounds=4", f"strategy.max_bytes={count * 4 * size}") for count in (2, 4))
    with runfolder.claimed(tmp_path / "run", small_in(tmp_path / "run", less), []):
        play(less, tmp_path / "run")
    results = measured(tmp_path / "run")
    assert results["rounds"] == 2
    assert not runfolder.has_more_room(tmp_path / "run", less, results)
    assert runfolder.has_more_room(tmp_path / "run", more, results)
    more.resume = str(tmp_path / "run")
    with runfolder.claimed(tmp_path / "run", more, []) as resumes:
        play(more, tmp_path / "run", resumes=resumes)
    assert measured(tmp_path / "run")["rounds"] == 4


def small_in(folder, config):
    folder.mkdir()
    return config


def test_link_that_is_not_the_best_checkpoint_is_still_refused(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"overrides": [], "settings": {}}))
    (tmp_path / "best").symlink_to("peft_7")
    assert read_settings(tmp_path)
    (tmp_path / "best").unlink()
    (tmp_path / "best").symlink_to("/etc")
    with pytest.raises(SettingsError, match="holds links"):
        read_settings(tmp_path)


def test_checkpoint_needs_no_links(tmp_path, monkeypatch, caplog):
    (tmp_path / "peft_3").mkdir()
    monkeypatch.setattr(checkpoint.Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    checkpoint.point_to(tmp_path, 3)
    assert "cannot point to round 3" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.early_stop_rounds=2", "nothing is held out to measure; set dataset.eval_name, or strategy.fraction"),
        ("baseline=nosuch", "baseline=nosuch: use one of alone, central, or null"),
        ("evaluate.every_rounds=0", "evaluate.every_rounds=0: use a whole number of at least 1"),
    ],
)
def test_wrong_setting_gets_one_clear_line(setting, message):
    with pytest.raises(SettingsError, match=message):
        small(setting)


def test_budget_that_a_first_round_exceeds_is_an_error(tmp_path):
    config = small("num_rounds=3")
    config.strategy["max_bytes"] = 4.0 * make_federation(config, tmp_path / "none").budget.payload_bytes

    def nobody(partition, number, reply):
        reply.content.metric_records["metrics"]["train_loss"] = math.nan
        return reply

    with pytest.raises(RunError, match="strategy.max_bytes"):
        play(config, tmp_path, Clients(config, nobody))
    assert not (tmp_path / "results.json").exists()


def test_long_and_odd_category_names_are_cut_to_one_line(exact):
    worker, data = exact
    partition = worker.partition(GLOBAL_SET)
    names = ["x" * 300, "two\nlines", None, "[/bold]"]
    raw = with_categories(worker.eval_rows, (names * 51)[:203])
    found = set(evaluation.held_out(partition, np.arange(203), raw, "category").categories)
    assert found == {"x" * 100, "two lines", "", "[/bold]"}
    both = figures({str(number): np.array(GOOD) for number in range(101)})
    assert "by_category" not in both  # too many of all clients together


def test_wrong_limit_leaves_the_results_of_an_ended_run_alone(tmp_path):
    size = make_federation(small(), tmp_path / "none").budget.payload_bytes
    config = small("num_rounds=4", f"strategy.max_bytes={8 * size}")
    (tmp_path / "run").mkdir()
    with runfolder.claimed(tmp_path / "run", config, []):
        play(config, tmp_path / "run")
    worse = small("num_rounds=4", "strategy.max_bytes=10")
    worse.resume = str(tmp_path / "run")
    with pytest.raises(SettingsError, match="use at least"), runfolder.claimed(tmp_path / "run", worse, []):
        make_federation(worse, tmp_path / "run")
    assert measured(tmp_path / "run")["rounds"] == 2


# --- one arithmetic -------------------------------------------------------------------------------


@pytest.fixture
def in_bfloat16(monkeypatch):
    """As on a GPU: the base model computes in bfloat16, and so does the adapter under autocast."""
    monkeypatch.setattr(adapters, "compute_dtype", lambda device=None: torch.bfloat16)


@pytest.mark.slow
def test_loss_is_the_same_before_and_after_the_first_training_and_in_test_py(in_bfloat16, tmp_path):
    config = small(HELD_OUT)
    worker, adapter = Worker(config), start(config)
    trained, _ = client.fine_tune(Worker(config), adapter, 0, training.Task(1, 3e-3))
    before = evaluate_adapter(worker, trained, GLOBAL_SET)
    client.fine_tune(worker, adapter, 1, training.Task(1, 3e-3))
    after = evaluate_adapter(worker, trained, GLOBAL_SET)
    for category, sums in before.items():
        np.testing.assert_array_equal(sums, after[category])

    lora, _ = adapters.adapter_plan(config.model, read_config(config.model))
    adapters.save_adapter(tmp_path / "peft_1", trained, lora, worker.template)
    options = cli.parse(
        [f"--peft-path={tmp_path / 'peft_1'}", f"--quantization={config.model.quantization}", "--question=x"]
    )
    asked = Answerer(tmp_path / "peft_1", options)
    data = worker.held_out(GLOBAL_SET)
    there = score(asked.model, asked.tokenizer, data, config.train.tokens_at_once)
    for category, sums in before.items():
        np.testing.assert_array_equal(sums[:3], there[category][:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["model.lora.bias=lora_only", "+model.lora.lora_bias=true", "+model.lora.modules_to_save=[lm_head,norm]"]
)
def test_float32_parts_of_an_adapter_train_are_measured_and_answer(part, in_bfloat16):
    config = small(HELD_OUT, part, "evaluate.answers=1", "evaluate.max_new_tokens=2")
    worker = Worker(config)
    adapter = worker.initial
    trained, _ = client.fine_tune(worker, adapter, 0, training.Task(1, 3e-3))
    assert not all(np.array_equal(trained[name], adapter[name]) for name in adapter)
    assert figures(evaluate_adapter(worker, trained, GLOBAL_SET))["answers"] == 1


def test_batches_hold_as_many_tokens_as_allowed_and_every_row_once():
    lengths = [5, 30, 7, 100, 7, 28, 1]
    batches = evaluation.in_batches(lengths, 60)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches == [[3], [1, 5], [2, 4, 0, 6]]  # 100 alone; 2 x 30; 4 x 7
    assert evaluation.in_batches([], 60) == []
