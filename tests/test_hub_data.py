"""Instruction data as it lies on the Hub: layouts of well-known data sets, each trained for a round."""

import pytest

import dataset
from data.files import data_files
from hub import models as hub
from settings.compose import compose
from settings.schema import DatasetConfig, SettingsError
from tests.federation import often, run_locally, small
from tests.hub.repositories import build
from tests.hub.server import LocalHub

LAYOUTS = {  # overrides: how it is read
    "dataset.name=vicgalle/alpaca-gpt4": "Alpaca: instruction, input, output, 400 rows, 400 assistant turns",
    "dataset.name=databricks/databricks-dolly-15k": (
        "Dolly: instruction, context, response, 300 rows, 300 assistant turns"
    ),
    "dataset.name=Open-Orca/SlimOrca": "chat: conversations, 300 rows, 300 assistant turns",
    "dataset.name=HuggingFaceH4/ultrachat_200k dataset.split=train_sft": (
        "chat: messages, 120 rows, 240 assistant turns"
    ),
    "dataset.name=HuggingFaceTB/smoltalk dataset.subset=all": "chat: messages, 100 rows, 200 assistant turns",
    "dataset.name=openai/gsm8k dataset.subset=main dataset.columns={instruction: question, output: answer}": (
        "Alpaca: question, answer, 200 rows, 200 assistant turns"
    ),
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    build(root, *(layout.split()[0].partition("=")[2] for layout in LAYOUTS))
    return root


@pytest.fixture
def local(repositories, tmp_path, monkeypatch):
    """The Hub of the tests, for this process, with empty caches."""
    with LocalHub(repositories) as server:
        for name, value in {
            "huggingface_hub.constants.ENDPOINT": server.url,
            "huggingface_hub.constants.HF_HUB_CACHE": str(tmp_path / "hub"),
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": (
                f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            ),
            "huggingface_hub.constants.HF_HUB_OFFLINE": False,
            "datasets.config.HF_ENDPOINT": server.url,
            "datasets.config.HF_DATASETS_CACHE": tmp_path / "rows",
            "datasets.config.HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub.forget()
        yield server
        hub.forget()


def overrides(layout: str) -> list[str]:
    return [f"dataset.{part}" for part in layout.removeprefix("dataset.").split(" dataset.")]


@pytest.mark.parametrize("layout", often(LAYOUTS, *list(LAYOUTS)[:2]))
def test_layout_of_the_hub_is_read_and_trained_for_a_round(layout, local, tmp_path):
    config = small(*overrides(layout), "num_rounds=1", "num_clients=2", "train.training_arguments.max_steps=1")
    rows = dataset.load_rows(config.dataset)
    assert str(dataset.survey(rows, lambda row: None)) == f"read as {LAYOUTS[layout]}"
    assert rows.select([0]).__iter__().__next__().answers
    _, summary = run_locally(config, tmp_path / "run")
    assert 0 < summary["final_train_loss"] < 20


def test_answers_of_a_configuration_are_its_own(local):
    layout = next(text for text in LAYOUTS if "gsm8k" in text)
    for name in ("main", "socratic"):
        config = compose([*overrides(layout), f"dataset.subset={name}", "dataset.split=test"]).dataset
        rows = dataset.load_rows(config)
        assert len(rows) == 20
        assert all(answer.endswith(f"#### {name}") for answer in rows.column("answer"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("dataset.name=openai/gsm8k", "dataset.subset=null: openai/gsm8k has main, socratic; choose one"),
        ("dataset.name=openai/gsm8k dataset.subset=x", "dataset.subset=x: openai/gsm8k has main, socratic; choose one"),
        (
            "dataset.name=HuggingFaceH4/ultrachat_200k",
            "dataset.split=train: HuggingFaceH4/ultrachat_200k has train_sft,",
        ),
        ("dataset.name=openai/gsm8k dataset.subset=main", "has no columns that make a row (it has question, answer)"),
    ],
)
def test_what_has_to_be_chosen_is_said(asked, message, local):
    with pytest.raises(SettingsError) as raised:
        dataset.load_rows(compose(overrides(asked)).dataset)
    assert message in str(raised.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cloned_repository_is_read_as_on_the_hub(layout, local, repositories):
    config = compose(overrides(layout)).dataset
    rows = dataset.load_rows(config)
    config.name = str(repositories / "datasets" / config.name)
    assert dataset.load_rows(config).table[:] == rows.table[:]


def test_without_the_hub_a_split_is_read_whole_or_not_at_all(local, monkeypatch):
    name = "HuggingFaceH4/ultrachat_200k"
    rows, other = (
        compose([f"dataset.name={name}", f"dataset.split={split}"]).dataset for split in ("train_sft", "test_sft")
    )
    before = dataset.load_rows(rows).table[:]
    assert not [request for request in local.requests if "test_sft-" in request.split("/")[-1]]
    hub.forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert dataset.load_rows(rows).table[:] == before
    with pytest.raises(SettingsError, match=f"not whole in the cache .*hf download {name} --repo-type=dataset"):
        dataset.load_rows(other)
    with pytest.raises(SettingsError, match=f"dataset.split=train: {name} has train_sft"):
        dataset.load_rows(compose([f"dataset.name={name}"]).dataset)


CONFIGS = """---
configs:
- config_name: main
  data_dir: main
  default: true
- config_name: other
  data_files: ./other.jsonl
- config_name: gone
  data_files: gone/*.txt
---
"""
CONFIGURED = "main/train.jsonl main/test.jsonl other.jsonl"
CHOSEN = {  # files, split and subset, README.md: what `datasets` takes of them, or what is said
    ("train.jsonl.gz test.jsonl.gz preference/all.jsonl.gz", "train", None, ""): "train.jsonl.gz",
    ("x.train.json x.dev.json", "validation", None, ""): "x.dev.json",
    ("train/data-00000-of-00001.arrow train/state.json test/data-00000-of-00001.arrow", "test", None, ""): (
        "test/data-00000-of-00001.arrow"
    ),
    ("data-00000-of-00001.arrow state.json", "train", "default", ""): "data-00000-of-00001.arrow",
    ("part-00000-of-00001.parquet", "train", None, ""): "part-00000-of-00001.parquet",
    ("a.json a.parquet config.json", "train", None, ""): "a.parquet",
    ("a.jsonl test.jsonl", "train", None, ""): "a.jsonl",
    (CONFIGURED, "train", None, CONFIGS): "main/train.jsonl",
    (CONFIGURED, "test", "main", CONFIGS): "main/test.jsonl",
    (CONFIGURED, "train", "other", CONFIGS): "other.jsonl",
    ("a.jsonl", "train", None, f"---\nconfigs: {'[' * 3000}\n---\n"): "a.jsonl",
    (CONFIGURED, "train", "gone", CONFIGS): "dataset.split=train: its README.md lists no file for it",
}


@pytest.mark.parametrize("asked", CHOSEN)
def test_files_of_a_split_are_those_that_datasets_takes(asked, tmp_path):
    names, split, subset, text = asked
    card = tmp_path / "README.md"
    card.write_text(text)
    try:
        found = " ".join(data_files(DatasetConfig("o/n", split=split, subset=subset), names.split(), card, True)[1])
    except SettingsError as error:
        found = str(error)
    assert found.startswith(CHOSEN[asked])
