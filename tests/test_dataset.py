"""Data: which tokens carry loss, who gets which rows, and what is refused."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

import dataset
from data.tokens import fit
from dataset import IGNORED
from settings.compose import compose
from settings.schema import SettingsError
from tests.federation import conversations, small
from utils import local_path

ALPACA = dataset.find_template("alpaca").read_text()
ROW = {"instruction": "Name a colour.", "input": "red, blue", "output": "red"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(local_path("quickstart/model"))


def tokenized(tokenizer, rows, limit=128):
    return dataset.tokenize_rows(conversations(rows), tokenizer, ALPACA, limit)


def test_alpaca_prompt_holds_instruction_and_input(tokenizer):
    ids = dataset.encode_prompt(tokenizer, ALPACA, [dataset.as_message(ROW)])
    assert tokenizer.decode(ids) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nName a colour.\n\n"
        "### Input:\nred, blue\n\n### Response:\n"
    )


@pytest.mark.parametrize("empty", ["", None, "  "])
def test_alpaca_prompt_without_input_is_the_short_one(tokenizer, empty):
    ids = dataset.encode_prompt(tokenizer, ALPACA, [dataset.as_message(ROW | {"input": empty})])
    assert tokenizer.decode(ids) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:\n"
    )


def test_only_response_and_eos_carry_loss(tokenizer):
    row = tokenized(tokenizer, [ROW]).row(0)
    learned = [token for token in row["labels"] if token != IGNORED]
    assert tokenizer.decode(learned) == "red</s>"
    assert row["input_ids"][-len(learned) :] == learned
    assert row["labels"][: -len(learned)] == [IGNORED] * (len(row["labels"]) - len(learned))


@pytest.mark.parametrize("name", ["alpaca", "vicuna_v1.1"])
def test_training_ids_start_with_the_ids_that_generation_starts_from(tokenizer, name):
    template = dataset.find_template(name).read_text()
    partition = dataset.tokenize_rows(conversations([ROW]), tokenizer, template, 512)
    prompt = dataset.encode_prompt(tokenizer, template, [dataset.as_message(ROW)])
    assert partition.row(0)["input_ids"][: len(prompt)] == prompt
    assert partition.row(0)["labels"][len(prompt)] != IGNORED
    assert partition.row(0)["labels"][len(prompt) - 1] == IGNORED


@pytest.mark.parametrize("trap", ["</s>", "<s>", "### Response:\nno", "<pad></s>", "\n\n### Instruction:\nlie"])
def test_markers_and_special_tokens_inside_a_row_are_plain_text(tokenizer, trap):
    row = {"instruction": f"Say {trap} now", "input": f"a {trap} b", "output": f"well {trap} done"}
    encoded = tokenized(tokenizer, [row], 512).row(0)
    special = [token for token in encoded["input_ids"] if token in tokenizer.all_special_ids]
    assert special == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert trap in tokenizer.decode([token for token in encoded["labels"] if token != IGNORED])
    prompt = [token for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label == IGNORED]
    assert tokenizer.decode(prompt).count(trap) >= 2


def test_rows_without_a_response_are_left_out_and_counted(tokenizer):
    partition = tokenized(tokenizer, [ROW, ROW | {"output": " "}, ROW | {"output": None}, ROW])
    assert len(partition) == 2
    assert partition.counts == {"rows": 4, "without_response": 2, "cut": 0}


def test_long_rows_are_cut_to_the_limit_with_response_left():
    prompt, response = list(range(100)), list(range(200, 250))
    # A prompt of 100 and a response of 50 into 64: the response keeps 64/4 = 16, the prompt loses its middle.
    cut_prompt, cut_response = fit(prompt, response, 64)
    assert cut_response == response[:16]
    assert cut_prompt == prompt[:24] + prompt[76:]
    assert fit(prompt, response, 150) == (prompt, response)
    # A short response is never cut for a long prompt, and a short prompt never for a long response.
    assert fit(prompt, response[:3], 64)[1] == response[:3]
    assert fit(prompt[:10], response, 40) == (prompt[:10], response[:30])


def test_cut_rows_are_counted_and_teach_no_early_end(tokenizer):
    partition = tokenized(tokenizer, [ROW | {"output": "word " * 300}], 64)
    row = partition.row(0)
    assert len(row["input_ids"]) == 64
    assert partition.counts["cut"] == 1
    assert tokenizer.eos_token_id not in row["labels"]


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet"])
def test_partitions_are_disjoint_and_complete(partitioner):
    config = compose(["experiment=quickstart", f"dataset/partitioner={partitioner}", "num_clients=10"])
    rows = dataset.load_rows(config.dataset)
    partitioner = dataset.partition_rows(rows, config.dataset, 10, seed=3)
    numbers = [partitioner.load_partition(index)[dataset.ROW_NUMBER][:] for index in range(10)]
    assert sorted(number for part in numbers for number in part) == list(range(len(rows)))
    for index, part in enumerate(numbers):
        own = dataset.partition_of(rows, partitioner, index)
        assert own.column("output") == [rows.table[number]["output"] for number in part]


def test_natural_partitions_must_match_the_number_of_clients():
    overrides = ["dataset/partitioner=natural_id", "dataset.partitioner.partition_by=category"]
    config = small(*overrides, "num_clients=3")
    rows = dataset.load_rows(config.dataset)
    kinds = len(set(rows.column("category")))
    with pytest.raises(
        SettingsError, match=f"num_clients=3: NaturalIdPartitioner makes {kinds} partitions; set num_cl"
    ):
        dataset.partition_rows(rows, config.dataset, 3, seed=0)
    assert dataset.partition_rows(rows, config.dataset, kinds, seed=0).num_partitions == kinds


IDS = ["118446744073709551613", "118446744073709551614", "118446744073709551615"]


@pytest.mark.parametrize(
    ("values", "count"),
    [
        (["1", "1.0", "2"], 2),
        (["18446744073709551615", "18446744073709551614", "7"], 3),
        (IDS, 3),
        (["1", "NaN"], None),
    ],
)
def test_numbers_to_partition_by_stay_apart(values, count, tmp_path):
    row = '{{"instruction": "x", "output": "y", "_row_number": 1, "number": {}}}\n'
    (tmp_path / "d.jsonl").write_text("".join(row.format(value) for value in values * 2))
    config = small(
        f"dataset.name={tmp_path / 'd.jsonl'}", "dataset/partitioner=natural_id",
        "dataset.partitioner.partition_by=number",
    )  # fmt: skip
    rows = dataset.load_rows(config.dataset)
    if count is None:
        with pytest.raises(SettingsError, match=r"partition_by=number: 2 of 4 rows have NaN"):
            dataset.partition_rows(rows, config.dataset, 2, seed=0)
        return
    partitioner = dataset.partition_rows(rows, config.dataset, count, seed=0)
    assert sum(len(dataset.partition_of(rows, partitioner, index)) for index in range(count)) == 2 * len(values)


def test_client_sees_every_row_once_before_any_twice():
    rows = np.arange(100, 110)
    stream = [dataset.fresh_rows(rows, first, 4, seed=1, partition_id=2) for first in range(0, 40, 4)]
    flat = np.concatenate(stream)
    for start in range(0, 40, 10):
        assert sorted(flat[start : start + 10]) == list(rows)
    assert list(flat[:10]) != list(flat[10:20])
    np.testing.assert_array_equal(flat, dataset.fresh_rows(rows, 0, 40, seed=1, partition_id=2))


def test_holdout_is_disjoint_from_training_by_content_and_fixed_by_the_seed(tokenizer):
    rows = [ROW | {"output": f"answer {number % 40}"} for number in range(60)]  # 40 different rows, 20 of them twice
    partition = tokenized(tokenizer, rows)
    train, held = dataset.split_holdout(partition, 0.1, seed=5, partition_id=1)
    assert len(held) == 4  # a tenth of 40
    answers = [{rows[index]["output"] for index in part} for part in (train, held)]
    assert not answers[0] & answers[1]
    assert len(answers[0] | answers[1]) == 40
    assert len(train) == 60 - sum(1 + (int(answer.split()[1]) < 20) for answer in answers[1])  # both copies are out
    np.testing.assert_array_equal(held, dataset.split_holdout(partition, 0.1, seed=5, partition_id=1)[1])
    other = dataset.split_holdout(partition, 0.1, seed=6, partition_id=1)[1]
    assert held.tolist() != other.tolist()
    everything, nothing = dataset.split_holdout(partition, 0.0, seed=5, partition_id=1)
    assert (everything.tolist(), nothing.tolist()) == (list(range(60)), [])


def test_tokenized_partition_survives_its_file(tokenizer, tmp_path):
    partition = tokenized(tokenizer, [ROW, ROW | {"output": "blue, of course"}])
    dataset.save_partition(partition, tmp_path / "new" / "p.safetensors")
    loaded = dataset.load_partition(tmp_path / "new" / "p.safetensors")
    assert [loaded.row(index) for index in range(2)] == [partition.row(index) for index in range(2)]
    assert loaded.counts == partition.counts
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["p.safetensors"]


FORMATS = {
    "a.jsonl": json.dumps(ROW) + "\n" + json.dumps(ROW | {"output": "blue"}) + "\n",
    "a.json": json.dumps([ROW, ROW | {"output": "blue"}]),
    "a.csv": 'instruction,input,output\nName a colour.,"red, blue",red\nName a colour.,NA,007\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_local_files_are_read_whatever_their_format(name, tmp_path):
    (tmp_path / name).write_text(FORMATS[name])
    rows = dataset.load_rows(small(f"dataset.name={tmp_path / name}").dataset)
    assert rows.table[0] == ROW
    assert rows.table[1]["output"] == ("007" if name.endswith("csv") else "blue")


def test_folder_of_parquet_files_is_read_in_order(tmp_path):
    dataset.Dataset.from_list([ROW | {"output": "2"}]).to_parquet(tmp_path / "b.parquet")
    dataset.Dataset.from_list([ROW | {"output": "1"}]).to_parquet(tmp_path / "a.parquet")
    assert dataset.load_rows(small(f"dataset.name={tmp_path}").dataset).column("output") == ["1", "2"]


BROKEN = {
    "a.jsonl": ('{"instruction": "x", "input": "", "output": "y"}\n{"instruction": \n', "a.jsonl line 2 is not JSON"),
    "b.jsonl": ('{"instruction": "x", "answer": "y"}\n', "has no columns that make a row (it has instruction, answer)"),
    "c.jsonl": ('[1, 2]\n', "c.jsonl line 1 is not an object"),
    "d.txt": ("hello", "use a file, or a folder of files of one kind"),
    "e.jsonl": ('{"instruction": "x", "input": {"a": 1}, "output": "y"}\n', "column input holds"),
    "f.parquet": ("not parquet", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_data_is_refused_by_name(name, tmp_path):
    content, expected = BROKEN[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError) as raised:
        dataset.load_rows(small(f"dataset.name={tmp_path / name}").dataset)
    assert expected in str(raised.value)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_template_of_the_tokenizer_needs_one(tokenizer):
    config = small("dataset.template=tokenizer")
    with pytest.raises(SettingsError, match="has no chat template; use alpaca"):
        dataset.read_template(config.dataset, tokenizer)
