"""The model card: what the Hub reads, what people read, and nothing of this machine."""

import io
import json
import zipfile

import pytest
from flwr.cli.build import build_fab_from_disk
from huggingface_hub import ModelCard

import model as adapters
from runs.card import write_card
from runs.runfolder import find_checkpoint
from tests.federation import small
from utils import SUITE_FOLDER

METRICS = [
    {
        "round": 1, "train_loss": 2.0, "num_examples": {"0": 90, "3": 80}, "bytes_up": 5e6, "bytes_down": 7e6,
        "held_out_before": {"global": {"loss": 1.5, "perplexity": 4.482, "token_accuracy": 0.5, "tokens": 10}},
    },
    {
        "round": 2, "train_loss": 1.0, "num_examples": {3: 80}, "bytes_up": 5e6, "bytes_down": 6e6,
        "held_out": {
            "global": {
                "loss": 0.25, "perplexity": 1.284, "token_accuracy": 0.875, "tokens": 10, "exact_match": 0.5,
                "rouge_l": 0.75, "answers": 4,
                "by_category": {"sort | sum": {"loss": 0.125, "perplexity": 1.133, "token_accuracy": 1.0, "tokens": 4}},
            }
        },
    },
]  # fmt: skip


def card_of(folder, *settings, metrics=METRICS, own_data=False):
    config = small("num_rounds=3", *settings)
    write_card(folder, config, adapters.lora_config(config.model), metrics, own_data)
    return ModelCard.load(folder / "README.md")


def test_card_of_published_names_has_what_the_hub_reads(tmp_path, pictures):
    settings = ["model.name=openlm-research/open_llama_3b_v2", "dataset.name=vicgalle/alpaca-gpt4"]
    card = card_of(tmp_path, *settings, "model.quantization=4")
    data = card.data.to_dict()
    assert data["base_model"] == "openlm-research/open_llama_3b_v2"
    assert data["datasets"] == ["vicgalle/alpaca-gpt4"]
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert {"lora", "federated-learning"} <= set(data["tags"])
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    expected = {"loss": 0.25, "perplexity": 1.284, "token_accuracy": 0.875, "exact_match": 0.5, "rouge_l": 0.75}
    assert results == expected
    assert 'from_pretrained("openlm-research/open_llama_3b_v2", **as_in_training)' in card.text
    assert "| before | 1.5000 | 4.482 | 50.0% |  |  |" in card.text
    assert "| after | 0.2500 | 1.284 | 87.5% | 50.0% | 0.750 |" in card.text
    assert r"| after, sort \| sum | 0.1250 | 1.133 | 100.0% |  |  |" in card.text
    assert "170 rows of the 2 clients that took part" in card.text
    assert "| rounds | 2 of 3 |" in card.text
    assert "| sent | 23.0 MB as fp32 |" in card.text
    assert (tmp_path / "train_loss.png").read_bytes().startswith(b"\x89PNG")


def test_card_names_nothing_of_this_machine(tmp_path):
    secret = tmp_path / "patients of ward 7"
    secret.mkdir()
    (secret / "rows.jsonl").write_text("{}")
    settings = [f"dataset.name='{secret / 'rows.jsonl'}'", f"model.name='{secret}'", f"dataset.eval_name='{secret}'"]
    config = small("num_rounds=3", *settings)
    write_card(tmp_path, config, adapters.lora_config(config.model), METRICS, False)
    text = (tmp_path / "README.md").read_text()
    assert "ward" not in text
    assert str(tmp_path) not in text
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert "base_model" not in data
    assert "datasets" not in data


def test_data_of_the_clients_own_is_not_taken_for_the_named_one(tmp_path):
    card = card_of(tmp_path, "dataset.name=vicgalle/alpaca-gpt4", own_data=True)
    assert "alpaca" not in card.content
    assert "the clients' own" in card.text


@pytest.mark.parametrize("place", ["{suite}/tests", "tests", "patients/ward7/x", "{suite}/quickstart/data/train.jsonl"])
def test_card_names_no_path_below_the_suite_or_on_another_machine(place, tmp_path):
    place = place.format(suite=SUITE_FOLDER)
    card = card_of(tmp_path, f"dataset.name={place}", f"dataset.eval_name={place}/rows.jsonl")
    assert place not in card.content
    assert "rows.jsonl" not in card.content


def test_baseline_says_what_it_is_and_not_what_nobody_measured(tmp_path):
    card = card_of(tmp_path, "baseline=alone", "dataset.eval_name=x/y")
    assert card.data.eval_results is None
    assert "0.2500" not in card.text
    assert "Nobody has measured it" in card.text
    assert "showed to nobody" not in card_of(tmp_path, "baseline=central").text


def test_categories_of_clients_own_rows_and_markup_stay_out(tmp_path):
    figure = {"loss": 0.125, "perplexity": 1.133, "token_accuracy": 1.0, "tokens": 4}
    held_out = {kind: figure | {"by_category": {f"<b>[{kind}](http://x)": figure}} for kind in ("global", "clients")}
    card = card_of(tmp_path, metrics=[METRICS[0], METRICS[1] | {"held_out": held_out}])
    assert r"after, \<b\>\[global\](http://x) |" in card.text
    assert "[clients" not in card.text


def test_card_without_measurements_says_nothing_about_them(tmp_path):
    card = card_of(tmp_path, metrics=METRICS[:1])
    assert card.data.eval_results is None
    assert "nobody trained on" not in card.text


@pytest.mark.parametrize("quantization", ["4", *(pytest.param(q, marks=pytest.mark.slow) for q in ("8", "none"))])
def test_code_of_the_card_runs(quantization, tmp_path, monkeypatch, capsys):
    config = small(f"model.quantization={quantization}")
    lora = adapters.lora_config(config.model)
    empty = adapters.empty_model(adapters.read_config(config.model), config.model)
    adapter = adapters.initial_adapter(adapters.adapter_shapes(empty, lora), lora, 0)
    adapters.save_adapter(tmp_path / "peft_1", adapter, lora, "{{ messages[0].content }}")
    write_card(tmp_path / "peft_1", config, lora, METRICS, False)
    text = (tmp_path / "peft_1" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("THIS_REPOSITORY_OR_FOLDER", str(tmp_path / "peft_1")).replace("=256", "=3")
    code = code.replace('open("', f'open("{tmp_path / "peft_1"}/').replace("QUESTION", "Work out the sum. 1 and 2")
    exec(compile(code, "card", "exec"), {})  # noqa: S102
    assert "Work out the sum. 1 and 2" in capsys.readouterr().out


def test_bundle_for_flower_holds_the_text_of_the_card():
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(SUITE_FOLDER))) as bundle:
        assert bundle.read("runs/card.md") == (SUITE_FOLDER / "runs/card.md").read_bytes()


def test_card_may_be_edited_and_the_checkpoint_stays_whole(tmp_path):
    from utils import write_digests

    config = small()
    lora = adapters.lora_config(config.model)
    adapters.save_adapter(tmp_path / "peft_1", {}, lora, "x")
    write_card(tmp_path / "peft_1", config, lora, METRICS, False)
    write_digests(tmp_path / "peft_1")
    assert "README.md" not in json.loads((tmp_path / "peft_1" / "sha256.json").read_text())
    (tmp_path / "peft_1" / "README.md").write_text("mine")
    assert find_checkpoint(str(tmp_path)).name == "peft_1"
