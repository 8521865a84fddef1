"""Private data: load, partition, prompt template, tokens and loss mask.

A row becomes `prompt + response`; only the response and the end-of-sequence token carry loss. Prompt
and response are tokenized apart, so the boundary is exact for every tokenizer and a row's own text can
never be taken for a marker or a special token.
"""

import contextlib
import csv
import functools
import inspect
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, disable_progress_bars, load_dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from hub.data import data_builder
from settings.schema import CONFIG_FOLDER, DatasetConfig, SettingsError, check_keywords
from utils import generator, local_path, shipped_path, shortened

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

log = logging.getLogger(__name__)

COLUMNS = ("instruction", "input", "output")
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
TEMPLATE_FOLDER = CONFIG_FOLDER / "template"
IGNORED = -100  # the label that carries no loss
DAY = "{%- macro strftime_now(format) %}{{ FORMAT }}{% endmacro %}"  # in front of a template, stands for the real one
DATE_CODES = ("-d", "-H", "-I", "-m", "-M", "-S", *"aAbBcdDeFhHIjmMpSTuxXyY")  # of strftime
TODAY = date(2024, 7, 26)  # for templates that write the date: each day of a run and its resume has the same tokens


# --- load and partition ---------------------------------------------------------------------------


def load_rows(cfg: DatasetConfig) -> Dataset:
    """All rows of `dataset.name`, with the columns instruction, input and output.

    Raises:
        SettingsError: if there is no such data set, it cannot be read, or lacks a column.
    """
    disable_progress_bars()
    path = local_rows(cfg.name)
    rows = read_local(cfg, path) if path else read_hub(cfg)
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise SettingsError(
            f"dataset.name={cfg.name}: has no column {', '.join(missing)} (it has {', '.join(rows.column_names)}); "
            f"Alpaca columns are needed: {', '.join(COLUMNS)}"
        )
    if not len(rows):
        raise SettingsError(f"dataset.name={cfg.name}: has no rows")
    check_column_types(rows, cfg.name)
    return rows


def local_rows(name: str, key: str = "dataset.name") -> Path | None:
    """The file or folder that `name`, the value of `key`, means; None for a Hub id.

    Raises:
        SettingsError: if it can be no Hub id, and is not there.
    """
    path = local_path(name)
    if path is None and (Path(name).suffix in READERS or name.startswith(("/", ".", "~"))):
        raise SettingsError(f"{key}={name}: there is no such file or folder")
    return path


def load_eval_rows(cfg: DatasetConfig) -> Dataset:
    """All rows of `dataset.eval_name`, as `load_rows` has them."""
    try:
        return load_rows(replace(cfg, name=str(cfg.eval_name), split=cfg.eval_split))
    except SettingsError as error:
        words = str(error).replace("dataset.name=", "dataset.eval_name=")
        raise SettingsError(words.replace("dataset.split=", "dataset.eval_split=")) from error


def read_local(cfg: DatasetConfig, path: Path) -> Dataset:
    """Rows of a file, or of all files of one kind in a folder, in the order of their names."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in READERS)
    kinds = {READERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise SettingsError(
            f"dataset.name={cfg.name}: use a file, or a folder of files of one kind, out of {', '.join(READERS)}"
        )
    kind = str(kinds.pop())
    try:
        options = csv_options(files[0]) if kind == "csv" else {}
        rows = load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
        rows.data.table.validate(full=True)  # JSON's reader takes text that is not UTF-8
        return rows
    except Exception as error:  # the readers raise what their parsers raise
        raise SettingsError(f"dataset.name={cfg.name}: {explain_unreadable(files, kind, error)}") from error


def csv_options(path: Path) -> dict[str, Any]:
    """Read every column as text, as it stands: 007 stays 007 and NA stays NA."""
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    return {"keep_default_na": False, "features": Features({name: Value("string") for name in header})}


def explain_unreadable(files: Sequence[Path], kind: str, error: Exception) -> str:
    """Where a file is broken: the line for JSONL, the parser's words otherwise."""
    for file in files if kind == "json" else []:
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            try:
                row = json.loads(line.decode() or "{}")
            except UnicodeDecodeError:
                return f"{file.name} line {number} is not UTF-8 text"
            except ValueError as problem:
                return f"{file.name} line {number} is not JSON ({problem})"
            if not isinstance(row, dict):
                return f"{file.name} line {number} is not an object with the fields {', '.join(COLUMNS)}"
    if not any(file.stat().st_size for file in files):
        return "is empty"
    cause = error.__cause__ or error
    return f"cannot be read ({shortened(cause, 300)})"


def read_hub(cfg: DatasetConfig) -> Dataset:
    """Rows of a Hub data set.

    Raises:
        SettingsError: if there is none of that name or split for this user, or it cannot be read.
        RunError: if the network fails, and the data set is not in the cache.
    """
    builder = data_builder(cfg.name)
    try:
        builder.download_and_prepare()
        with contextlib.suppress(OSError):
            os.utime(builder.cache_dir)  # processes that ask nobody take what was read last
    except Exception as error:  # readers raise what their parsers raise
        reason = shortened(error.__cause__ or error, 300)
        raise SettingsError(f"dataset.name={cfg.name}: cannot be read ({reason})") from error
    try:
        rows = builder.as_dataset(cfg.split)
    except ValueError as error:
        raise SettingsError(f"dataset.split={cfg.split}: {cfg.name} has {', '.join(builder.info.splits)}") from error
    if isinstance(rows, DatasetDict) or not isinstance(rows, Dataset):
        raise SettingsError(f"dataset.split={cfg.split}: name one split")
    return rows


def check_column_types(rows: Dataset, name: str) -> None:
    """Raise SettingsError if an Alpaca column holds anything but text, numbers, booleans and nothing."""
    for column in COLUMNS:
        kind = getattr(rows.features[column], "dtype", "list")
        if not isinstance(kind, str) or not kind.startswith(
            ("string", "large_string", "int", "uint", "float", "bool", "null")
        ):
            raise SettingsError(f"dataset.name={name}: column {column} holds {kind}; text is needed")


def partition_rows(rows: Dataset, cfg: DatasetConfig, num_partitions: int, seed: int) -> "Partitioner":
    """A Flower Datasets partitioner over `rows`, with `num_partitions` and `seed` where it takes them.

    Raises:
        SettingsError: if the class, an argument or the number of partitions does not fit.
    """
    chosen = partitioner_class(cfg)
    arguments = {name: value for name, value in cfg.partitioner.items() if name != "_target_"}
    takes = inspect.signature(chosen).parameters
    if "num_partitions" in takes:
        arguments["num_partitions"] = num_partitions
    if "seed" in takes:
        arguments.setdefault("seed", seed)
    if num_partitions > len(rows):
        raise SettingsError(f"num_clients={num_partitions}: more clients than the {len(rows)} rows of {cfg.name}")
    try:
        partitioner: Partitioner = chosen(**arguments)
        partitioner.dataset = rows
        count = partitioner.num_partitions
    except Exception as error:  # partitioners raise what their arithmetic raises
        raise SettingsError(f"dataset.partitioner={chosen.__name__}: {shortened(error, 300)}") from error
    if count != num_partitions:
        raise SettingsError(
            f"num_clients={num_partitions}: {chosen.__name__} makes {count} partitions; set num_clients={count}"
        )
    return partitioner


def partitioner_class(cfg: DatasetConfig) -> "type[Partitioner]":
    from flwr_datasets.partitioner import Partitioner  # its plots take seconds to import
    from hydra.utils import get_class

    target = cfg.partitioner["_target_"]
    try:
        chosen: type[Partitioner] = get_class(target)
    except Exception as error:
        raise SettingsError(f"dataset.partitioner._target_={target}: there is no such class") from error
    if not issubclass(chosen, Partitioner):
        raise SettingsError(f"dataset.partitioner._target_={target}: not a flwr_datasets partitioner")
    check_keywords("dataset.partitioner", cfg.partitioner, chosen, {"num_partitions": "set num_clients"})
    return chosen


# --- prompt, tokens and loss mask -----------------------------------------------------------------


def read_template(cfg: DatasetConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja chat template that `dataset.template` names.

    Raises:
        SettingsError: if there is none of that name.
    """
    if cfg.template == "tokenizer":
        own = own_template(tokenizer)
        if own is None:
            raise SettingsError("dataset.template=tokenizer: this model's tokenizer has no chat template; use alpaca")
        return own
    try:
        return on_one_day(find_template(cfg.template).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"dataset.template={cfg.template}: not a text file") from error


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template, of several the one called `default`; None if it has none.

    Raises:
        SettingsError: if none of several is called so.
    """
    named = tokenizer.chat_template
    if not isinstance(named, dict):
        return named and on_one_day(named)
    if "default" not in named:
        raise SettingsError(
            f"dataset.template=tokenizer: this model has the chat templates {', '.join(sorted(named))} and none "
            "of them is called default; save the one you want as a Jinja file and give its path"
        )
    return on_one_day(str(named["default"]))


def on_one_day(template: str) -> str:
    """`template`, if it writes today's date, with TODAY in its place: also for whoever loads it with the adapter."""
    if "strftime_now" not in template or template.startswith(DAY[:20]):
        return template
    written = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in DATE_CODES)
    return DAY.replace("FORMAT", f"format{written}") + "\n" + template  # the line break is trimmed, as behind any block


def find_template(name: str) -> Path:
    """The file of a template of conf/template, or of the user's own."""
    path = shipped_path(f"conf/template/{name}.jinja") or local_path(name)
    if path is None or not path.is_file():
        known = ", ".join(sorted(file.stem for file in TEMPLATE_FOLDER.glob("*.jinja")))
        raise SettingsError(f"dataset.template={name}: use {known}, tokenizer, or the path of a Jinja file")
    return path


def as_message(row: Mapping[str, Any]) -> dict[str, str]:
    """The user's turn of an Alpaca row. `content` holds instruction and input, whatever the template."""
    instruction, given = text_of(row["instruction"]), text_of(row.get("input"))
    content = f"{instruction}\n\n### Input:\n{given}" if given.strip() else instruction
    return {"role": "user", "content": content, "input": given.strip()}


def text_of(value: Any) -> str:
    return "" if value is None else str(value)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Token ids of a conversation up to where the response starts: the same in training and in generation."""
    return encode_text(tokenizer, render(tokenizer, template, messages, for_response=True))


def encode_response(
    tokenizer: PreTrainedTokenizerBase, template: str, message: Mapping[str, str], response: str
) -> list[int]:
    """Token ids of the response, up to and including the first that ends an answer; EOS if the template writes none.

    Raises:
        SettingsError: if the template does not write the response behind the prompt.
    """
    prompt = render(tokenizer, template, [message], for_response=True)
    whole = render(tokenizer, template, [message, {"role": "assistant", "content": response}], for_response=False)
    if not whole.startswith(prompt):
        raise SettingsError("dataset.template: with a response it does not start as without one; use another template")
    ids = encode_text(tokenizer, whole[len(prompt) :], lead_of(tokenizer, prompt))
    ends = end_ids(tokenizer)
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    return [*ids, tokenizer.eos_token_id] if end is None else ids[: end + 1]  # what a template writes behind it is cut


@functools.lru_cache(maxsize=4)
def end_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's EOS, and those that the model's own files name beside it."""
    ends: set[int] = {tokenizer.eos_token_id}
    for file in ("generation_config.json", "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            named = json.loads((Path(tokenizer.name_or_path) / file).read_text(encoding="utf-8")).get("eos_token_id")
            ends |= {named} if isinstance(named, int) else set(named or [])
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(end for end in ends if end in special or end == tokenizer.eos_token_id)


def render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Mapping[str, str]], *, for_response: bool
) -> str:
    """The template's text, in which special tokens that were spelled out by a user are marked as such."""
    safe = mark_control_tokens([dict(turn) for turn in messages], special_tokens(tokenizer))
    return str(
        tokenizer.apply_chat_template(safe, chat_template=template, tokenize=False, add_generation_prompt=for_response)
    )


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """How the tokenizer's special tokens are spelled; those in no named role, such as <|start_header_id|>, included."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def lead_of(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What the tokens of a response depend on: the special token that a prompt ends with, or just that there is text.

    A SentencePiece tokenizer puts a blank before whatever it is given, and some before what follows a special token.
    """
    last = max(special_tokens(tokenizer).finditer(prompt), key=lambda found: found.start(), default=None)
    return "\n" if last is None or prompt[last.end() :].strip() else prompt[last.start() :]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, lead: str = "") -> list[int]:
    """Token ids of rendered text: the template's special tokens are special, marked ones are plain text.

    Args:
        lead: what stands before the text, and is not returned; where its tokens run into the text's, the text stands
            alone.
    """
    try:
        before, ids = (encode_marked_chat(tokenizer, part) if part else [] for part in (lead, lead + text))
        return ids[len(before) :] if ids[: len(before)] == before else encode_marked_chat(tokenizer, text)
    except ValueError as error:
        raise SettingsError(f"a row cannot become tokens: {shortened(error, 200)}; remove that text") from error


def fit(prompt: list[int], response: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Cut a row to `limit` tokens so that response is left: at least a quarter of `limit`, if it has as many.

    The prompt loses its middle, so that the task's start and the response marker stay. The response
    loses its end, with the end-of-sequence token: a cut answer must not teach to stop there.
    """
    kept = max(limit - len(prompt), min(len(response), limit // 4))
    response = response[:kept]
    room = limit - len(response)
    if len(prompt) > room:
        tail = room // 2
        prompt = prompt[: room - tail] + prompt[len(prompt) - tail :]
    return prompt, response


@dataclass(frozen=True)
class Partition:
    """A client's tokenized rows, and what was left out.

    ids: all rows one behind the other, int32. starts: where each row begins, and the end; rows + 1
    entries. prompts: tokens of each row's prompt. sources: number of each row before any were left out.
    counts: rows, without_response, cut.
    """

    ids: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray
    sources: np.ndarray
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, index: int) -> dict[str, list[int]]:
        """One row as `input_ids` and `labels`, the prompt masked."""
        ids = self.ids[self.starts[index] : self.starts[index + 1]].tolist()
        prompt = int(self.prompts[index])
        return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, limit: int
) -> Partition:
    """Tokenize `rows`. Rows without a response are left out and counted, rows over `limit` tokens are cut."""
    encoded: list[tuple[list[int], list[int]]] = []
    sources: list[int] = []
    counts = {"rows": 0, "without_response": 0, "cut": 0}
    for row in rows:
        counts["rows"] += 1
        response = text_of(row["output"])
        if not response.strip():
            counts["without_response"] += 1
            continue
        message = as_message(row)
        whole = encode_prompt(tokenizer, template, [message]), encode_response(tokenizer, template, message, response)
        encoded.append(fit(*whole, limit))
        sources.append(counts["rows"] - 1)
        counts["cut"] += encoded[-1] != whole
    lengths = [len(prompt) + len(response) for prompt, response in encoded]
    return Partition(
        ids=np.array([token for pair in encoded for part in pair for token in part], np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompts=np.array([len(prompt) for prompt, _ in encoded], np.int32),
        sources=np.array(sources, np.int32),
        counts=counts,
    )


def save_partition(partition: Partition, path: Path) -> None:
    """Keep a tokenized partition for the run's other workers, if there is room. Safe when two write the same one."""
    beside = path.with_suffix(f".{os.getpid()}")
    arrays = {key: value for key, value in vars(partition).items() if isinstance(value, np.ndarray)}
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(arrays, beside, metadata={key: str(count) for key, count in partition.counts.items()})
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("%s: the other workers must tokenize it again (%s)", path.name, error)
        beside.unlink(missing_ok=True)


def load_partition(path: Path) -> Partition | None:
    """What `save_partition` kept; None if it is not there, or damaged."""
    try:
        with safe_open(path, framework="np") as file:
            counts = {key: int(count) for key, count in file.metadata().items()}
        return Partition(counts=counts, **load_file(path))
    except (OSError, SafetensorError):
        return None


# --- which rows, and in which order ---------------------------------------------------------------


def split_holdout(partition: Partition, share: float, seed: int, partition_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for evaluation: `share` of the different rows, drawn once for a partition.

    Rows with the same tokens stay together, so that nothing that is held out is trained on in another copy; of
    these copies one is evaluated.
    """
    texts = [partition.ids[start:end].tobytes() for start, end in pairwise(partition.starts.tolist())]
    first = {text: number for number, text in reversed(list(enumerate(texts)))}
    different = sorted(first.values())
    drawn = generator("holdout", seed, partition_id).permutation(different)[: int(len(different) * share)]
    held = {texts[number] for number in drawn}
    training = [number for number, text in enumerate(texts) if text not in held]
    return np.array(training, np.int64), np.sort(drawn).astype(np.int64)


def fresh_rows(rows: np.ndarray, first: int, count: int, seed: int, partition_id: int) -> np.ndarray:
    """`count` entries of `rows` from position `first` on: shuffled passes, a new order for each pass."""
    passes = {
        number: generator("order", seed, partition_id, number).permutation(rows)
        for number in range(first // len(rows), (first + count - 1) // len(rows) + 1)
    }
    return np.array([passes[position // len(rows)][position % len(rows)] for position in range(first, first + count)])
