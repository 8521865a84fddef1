"""Whatever settings and rows come, the answer is a run or one line: nothing but SettingsError leaves the checks."""

import copy
import csv
import io
import json
import string

import datasets
import hydra
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.cells import text_of
from dataset import load_rows, partition_of, partition_rows, tokenize_rows
from model import read_tokenizer
from server import plan
from settings.compose import checked, one_line
from settings.schema import CONFIG_FOLDER, DatasetConfig, SettingsError, setting_names
from tests.federation import conversations, small

OFTEN = [100, pytest.param(2000, marks=pytest.mark.slow)]
FEW = [100, pytest.param(2000, marks=pytest.mark.slow)]


def examples(count: int):
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# --- settings -------------------------------------------------------------------------------------

PASSED_ON_KEYS = [
    "strategy._target_", "strategy.eta", "strategy.beta", "strategy.server_momentum", "strategy.proximal_mu",
    "strategy.fraction_train", "dataset.partitioner._target_", "dataset.partitioner.alpha", "dataset.partitioner.seed",
    "model.lora.r", "model.lora.lora_alpha", "model.lora.lora_dropout", "model.lora.target_modules",
    "model.lora.use_dora", "model.lora.bias", "model.lora.task_type", "train.training_arguments.max_steps",
    "train.training_arguments.per_device_train_batch_size", "train.training_arguments.gradient_accumulation_steps",
    "train.training_arguments.optim", "train.training_arguments.warmup_steps", "train.training_arguments.max_grad_norm",
    "train.training_arguments.weight_decay", "train.training_arguments.lr_scheduler_type",
]  # fmt: skip
TARGETS = st.sampled_from(
    [
        f"flwr.serverapp.strategy.{name}"
        for name in ("FedAvg", "FedAdam", "FedMedian", "Krum", "Bulyan", "FedXgbBagging", "Nothing")
    ]
    + ["flwr_datasets.partitioner.DirichletPartitioner", "os.system", "os", "builtins.dict", "a.b", ".", ""]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 40)
    | st.floats()
    | st.sampled_from(["4", "8", "none", "fp16", "int8", "all-linear", "???", "${seed}", "${nothing}", "q_proj"])
    | st.text(max_size=20)
    | TARGETS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)
KEYS = st.sampled_from(setting_names() + PASSED_ON_KEYS * 2) | st.text(
    string.ascii_lowercase + "._", min_size=1, max_size=12
)


@pytest.fixture(scope="module")
def composed():
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose("config", overrides=["experiment=quickstart"])


@pytest.mark.parametrize("count", OFTEN)
def test_any_settings_are_taken_or_answered_with_one_line(count, composed):
    @examples(count)
    @given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
    def holds(changes):
        cfg = copy.deepcopy(composed)
        try:
            for key, value in changes.items():
                OmegaConf.update(cfg, key, value, force_add=True)
            config = checked(cfg)
        except SettingsError as error:
            assert "\n" not in str(error)
            return
        except (OmegaConfBaseException, ValueError) as error:  # as main.py answers them
            assert "\n" not in one_line(error)
            return
        except (AttributeError, TypeError, KeyError) as error:
            if "OmegaConf.update" in str(error) or not is_from_the_checks(error):
                return  # such a key cannot be written on a command line
            raise
        try:
            plan.check_names(config)
        except SettingsError as error:
            assert "\n" not in str(error)

    holds()


def is_from_the_checks(error: BaseException) -> bool:
    """Whether the error left `checked`, and not the test's own way of setting a key."""
    trace, names = error.__traceback__, []
    while trace:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return "checked" in names


# --- rows -----------------------------------------------------------------------------------------

COLUMNS = ("instruction", "input", "output")
SPECIAL = [
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "### Response:\n",
    "### Instruction:\n",
    "\u202eright to left",
    "🙂🏳️‍🌈",
    "\ue000",
    "\0",
    "a" * 5000,
    "e\u0301",
]
TEXTS = st.lists(st.text(max_size=30) | st.sampled_from(SPECIAL), max_size=4).map("".join)
CELLS = TEXTS | st.none() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.booleans()
ODD = CELLS | st.lists(TEXTS, max_size=2) | st.dictionaries(TEXTS, TEXTS, max_size=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The library's own copy of what it reads, for these tests alone."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))
    yield
    datasets.config.HF_DATASETS_CACHE = before


def as_file(rows: list, kind: str) -> bytes:
    if kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(rows[0].keys() if rows else COLUMNS)
        writer.writerows([str(value) for value in row.values()] for row in rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    if kind == "json":
        return json.dumps(rows).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, TEXTS | st.none())), min_size=1, max_size=6) | st.lists(
    st.fixed_dictionaries(dict.fromkeys(COLUMNS, CELLS))
    | st.dictionaries(st.sampled_from([*COLUMNS, "more"]), ODD, max_size=4),
    max_size=6,
)


@pytest.mark.parametrize("count", FEW)
def test_any_file_of_rows_is_read_or_refused_by_name(count, cache, tmp_path):
    tokenizer, template = read_tokenizer(small().model), small_template()
    numbers = iter(range(10**9))

    @examples(count)
    @given(ROWS, st.sampled_from(["jsonl", "json", "csv"]), st.just(b"") | st.binary(max_size=6), st.integers(0, 10**6))
    def holds(rows, kind, noise, place):
        content = as_file(rows, kind)
        place %= len(content) + 1
        file = tmp_path / f"{next(numbers)}.{kind}"
        file.write_bytes(content[:place] + noise + content[place:])
        cfg = DatasetConfig(
            name=str(file), split="train", template="alpaca", holdout=0.0,
            partitioner={"_target_": "flwr_datasets.partitioner.IidPartitioner"},
        )  # fmt: skip
        try:
            loaded = load_rows(cfg)
            partition = partition_of(loaded, partition_rows(loaded, cfg, 2, 0), 0)
            made = tokenize_rows(partition, tokenizer, template, 64)
        except SettingsError as error:
            assert "\n" not in str(error)
            assert str(error).startswith((f"dataset.name={file}", "num_clients=2", "dataset.partitioner"))
        else:
            assert made.counts["rows"] == len(partition) == len(made) + sum(made.reasons.values())
        finally:
            file.unlink()

    holds()


def small_template() -> str:
    return (CONFIG_FOLDER / "template" / "alpaca.jinja").read_text()


@pytest.mark.parametrize("count", OFTEN)
def test_any_text_is_text_and_never_a_marker(count):
    tokenizer, template = read_tokenizer(small().model), small_template()
    special = set(tokenizer.all_special_ids)

    @examples(count)
    @given(st.fixed_dictionaries(dict.fromkeys(COLUMNS, CELLS)), st.integers(16, 600))
    def holds(row, limit):
        made = tokenize_rows(conversations([row]), tokenizer, template, limit)
        if not len(made):
            assert not text_of(row["output"]).strip()
            return
        [ids, labels] = made.row(0).values()
        learnt = [label for label in labels if label != -100]
        assert 0 < len(ids) <= limit
        assert learnt == ids[-len(learnt) :]
        inside = [token for token in ids if token in special - {tokenizer.unk_token_id}]
        harmless = conversations([dict.fromkeys(COLUMNS, "x")])
        plain = tokenize_rows(harmless, tokenizer, template, 600).row(0)["input_ids"]
        expected = [token for token in plain if token in special - {tokenizer.unk_token_id}]
        assert inside == expected or (made.counts["cut"] and inside == expected[: len(inside)])

    holds()
