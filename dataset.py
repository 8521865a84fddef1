"""python dataset.py dataset.name=FILE [KEY=VALUE ...] [--rows 3] [--json]: see rows as they are trained.

Private data, from any file to a client's tokens: rows are read as they stand (data/reading.py), become conversations
(data/forms.py), are divided between clients, and become tokens of which the answers alone carry loss (data/tokens.py).
This is the front: what the rest of the suite needs of it is named here.
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, ReadInstruction, disable_progress_bars

from data.cells import NUMBER, TEXT, TRUTH, object_in
from data.display import alarm
from data.files import CARD, data_files, kind_of, local_files
from data.forms import NO_ANSWER, Conversation, Rows, Survey, Turn, as_message, asked_in, form_of, left_out, survey
from data.reading import rows_of
from data.table import Table, table_of
from data.templates import encode_text, end_ids, find_template, read_template
from data.tokens import IGNORED, Partition, encode_prompt, encoded, load_partition, save_partition, tokenize_rows
from hub.access import ask, download, files_of, whole
from settings.schema import DatasetConfig, RunError, SettingsError, check_keywords
from utils import Bar, generator, local_path, shortened

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

__all__ = [
    "IGNORED", "NO_ANSWER", "Partition", "Rows", "Survey", "Turn", "alarm", "as_message", "asked_in", "encode_prompt",
    "encode_text", "encoded", "end_ids", "find_template", "kind_of", "left_out", "load_partition", "object_in",
    "read_template", "save_partition", "survey", "tokenize_rows",
]  # fmt: skip

ROW_NUMBER = "flowertune: row number"  # a column beside the user's own, by which partitioners say which rows are whose


# --- load -----------------------------------------------------------------------------------------


def load_rows(cfg: DatasetConfig) -> Rows:
    """All rows of `dataset.name`. Raises SettingsError if it cannot be found or read, or its columns make no rows."""
    return as_rows(read_table(cfg), cfg.columns, f"dataset.name={cfg.name}")


def read_table(cfg: DatasetConfig) -> Table:
    disable_progress_bars()
    path, name = local_rows(cfg.name), f"dataset.name={cfg.name}: "
    try:
        if "[" in cfg.split or "+" in cfg.split:
            return read_parts(cfg)
        kind, files = local_files(cfg, path) if path else hub_files(cfg)
        size, what = sum(file.stat().st_size for file in files), f"reading {Path(cfg.name).name}"
        with Bar(total=size, desc=what, unit="B", unit_scale=True, delay=2) as bar:
            rows = (rows_of(file, called, kind, cfg.split, bar.update) for file, called in files.items())
            return table_of(itertools.chain.from_iterable(rows))
    except SettingsError as error:
        raise SettingsError(name + str(error).removeprefix(name)) from error
    except OSError as error:
        what = f"{error.filename} " if error.filename else ""
        raise SettingsError(f"{name}{what}cannot be read ({error.strerror or error})") from error


def as_rows(table: Table, columns: Mapping[str, Any], name: str) -> Rows:
    if not table.columns.num_rows:
        raise SettingsError(f"{name}: has no rows")
    return Rows(
        name, Dataset(table.columns, fingerprint="rows"), form_of(table, columns, name), table.kinds, table.files
    )


def local_rows(name: str, key: str = "dataset.name") -> Path | None:
    """The file or folder that `name`, the value of `key`, means; None for a Hub id."""
    if not name.strip():
        raise SettingsError(f"{key}={name}: needs a file, a folder or the id of a Hub data set")
    path = local_path(name)
    if path is None and (kind_of(Path(name)) or name.startswith(("/", ".", "~"))):
        raise SettingsError(f"{key}={name}: there is no such file or folder")
    return path


def load_eval_rows(cfg: DatasetConfig) -> Rows:
    """All rows of `dataset.eval_name`, as `load_rows` has them; `dataset.columns` counts if it has all of them."""
    try:
        table = read_table(replace(cfg, name=str(cfg.eval_name), split=cfg.eval_split))
        fits = {*filter(None, cfg.columns.values())} <= {*table.columns.column_names}
        return as_rows(table, cfg.columns if fits else {}, f"dataset.eval_name={cfg.eval_name}")
    except (SettingsError, RunError) as error:
        words = str(error).replace("dataset.name=", "dataset.eval_name=")
        raise type(error)(words.replace("dataset.split=", "dataset.eval_split=")) from error


def hub_files(cfg: DatasetConfig) -> tuple[str, dict[Path, str]]:
    """As `local_files`, of a Hub data set: downloaded; where the Hub cannot be reached, the cache has to hold them all.

    Raises SettingsError if there is none of that name or split for this user, RunError if the network fails.
    """
    repository = ask(cfg.name, "dataset")
    with whole(repository):
        names = files_of(repository)
        about = download(repository, [name for name in names if name == CARD])
        kind, chosen = data_files(cfg, names, about / CARD, in_splits=True)
        folder = download(repository, chosen, about.name)
    return kind, {folder / name: name for name in chosen}


def read_parts(cfg: DatasetConfig) -> Table:
    """Rows of parts of splits, as `datasets` writes them: train[:10%]+test."""
    columns, kinds = [], dict[str, Mapping[str, str]]()
    for text in cfg.split.split("+"):
        part = copy(cfg)
        part.split = split = text.partition("[")[0].strip()
        table = read_table(part)
        try:
            [cut] = ReadInstruction.from_spec(text.strip()).to_absolute({split: table.columns.num_rows})
        except (ValueError, AssertionError) as error:
            raise SettingsError(f"dataset.split={cfg.split}: {shortened(error, 200)}") from error
        columns.append(table.columns.slice(cut.from_, cut.to - cut.from_))
        kinds |= {name: {**held, **kinds.get(name, {})} for name, held in table.kinds.items()}
    return Table(pa.concat_tables(columns, promote_options="default"), kinds)


# --- partition ------------------------------------------------------------------------------------


def partition_rows(rows: Rows, cfg: DatasetConfig, num_partitions: int, seed: int) -> "Partitioner":
    """A Flower Datasets partitioner over `rows`, with `num_partitions` and `seed` where it takes them.

    Raises SettingsError if the class, an argument, a column or the number of partitions does not fit.
    """
    chosen = partitioner_class(cfg)
    takes = inspect.signature(chosen).parameters
    arguments = {"num_partitions": num_partitions, "seed": seed} | cfg.partitioner
    arguments = {name: value for name, value in arguments.items() if name in takes}
    if num_partitions > len(rows):
        raise SettingsError(f"num_clients={num_partitions}: more clients than the {len(rows)} rows of {cfg.name}")
    numbered = with_values(rows, arguments.get("partition_by") or [])
    try:
        partitioner: Partitioner = chosen(**arguments)
        partitioner.dataset = numbered
        count = partitioner.num_partitions
    except Exception as error:  # partitioners raise what their arithmetic raises
        raise SettingsError(f"dataset.partitioner={chosen.__name__}: {shortened(error, 300)}") from error
    if count != num_partitions:
        raise SettingsError(
            f"num_clients={num_partitions}: {chosen.__name__} makes {count} partitions; set num_clients={count}"
        )
    return partitioner


def partition_of(rows: Rows, partitioner: "Partitioner", partition_id: int) -> Rows:
    """The rows of one client."""
    return rows.select(partitioner.load_partition(partition_id)[ROW_NUMBER][:])


def with_values(rows: Rows, partition_by: str | Sequence[str]) -> Dataset:
    """The user's columns with their row numbers, and with numbers as such where rows are partitioned by them."""
    table: pa.Table = rows.table.data.table
    for name in [partition_by] if isinstance(partition_by, str) else partition_by:
        key = f"dataset.partitioner.partition_by={name}"
        if name not in table.column_names:
            raise SettingsError(f"{key}: {rows.name.partition('=')[2]} has {', '.join(table.column_names)}")
        held = rows.kinds.get(name, {})
        if lists := [kind for kind in held if kind not in (TEXT, NUMBER, TRUTH)]:
            raise SettingsError(
                f"{key}: the column holds {lists[0]} ({held[lists[0]]}); partition by one of text or numbers"
            )
        column = table.column(name)
        if column.null_count:
            raise SettingsError(
                f"{key}: {column.null_count:,} of {len(rows):,} rows have none; fill it in, take these rows out, or "
                "use a partitioner that needs no column (dataset/partitioner=iid)"
            )
        if held.keys() == {NUMBER}:
            table = table.set_column(table.column_names.index(name), name, as_numbers(column, key))
    table = table.append_column(ROW_NUMBER, pa.array(np.arange(len(rows))))
    return Dataset(table, fingerprint="numbered")


def as_numbers(column: pa.ChunkedArray, key: str) -> pa.ChunkedArray:
    """Texts of numbers as such; as text if there is one among them of which 64 bits would make another."""
    with contextlib.suppress(pa.ArrowInvalid):
        return column.cast(pa.int64())
    if pc.any(pc.match_substring_regex(column, r"^-?\d{16,}$")).as_py():
        return column
    numbers = column.cast(pa.float64())
    if gaps := pc.sum(pc.is_nan(numbers)).as_py():
        raise SettingsError(f"{key}: {gaps:,} of {len(column):,} rows have NaN; fill it in, or take these rows out")
    return numbers


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


# --- which rows, and in which order ---------------------------------------------------------------


def split_holdout(partition: Partition, share: float, seed: int, partition_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for evaluation: `share` of the different rows, drawn once for a partition.

    Rows with the same tokens stay together, so that nothing that is held out is trained on in another copy; of
    these copies one is evaluated.
    """
    texts = partition.keys()
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


# --- fingerprints ---------------------------------------------------------------------------------


def data_facts(rows: Rows) -> dict[str, Any]:
    """A fingerprint of rows: their number, and a digest of all that is read of them."""
    columns = rows.form.columns
    keys = ["instruction", "input", "output"] if rows.form.shape == "Alpaca" else []
    keys += [key for key in columns if key not in keys]
    digest = hashlib.sha256()
    for block in rows.table.select_columns([*dict.fromkeys(columns.values())]).iter(1000):
        digest.update(json.dumps([block[columns[key]] if key in columns else None for key in keys]).encode())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def shared_rows(rows: Rows, held_out: Rows) -> list[int]:
    """Numbers of the held-out rows that are among `rows` too, word for word, whatever the form of either."""
    measured = [said_in(row) for row in held_out]
    trained_on = {*measured}.intersection(map(said_in, rows))
    return [number for number, said in enumerate(measured) if said in trained_on]


def said_in(row: Conversation) -> str:
    return json.dumps([[turn["role"], turn["content"]] for turn in row.turns])


# --- python dataset.py ----------------------------------------------------------------------------


def show(options: argparse.Namespace) -> None:
    """Print rows as they are trained, and the counts of all of them; or a JSON object for each."""
    from data import display
    from settings.compose import compose

    config = compose(options.overrides)
    rows, tokenizer = load_rows(config.dataset), tokenizer_for(config, options.overrides)
    template, limit = read_template(config.dataset, tokenizer), config.train.seq_length
    made = ((row, encoded(tokenizer, template, row, limit, config.dataset.train_on)) for row in rows)
    if options.json:
        for number, (row, result) in enumerate(itertools.islice(made, options.rows), start=1):
            print(display.as_json(tokenizer, number, row, result))
    else:
        display.show(rows, made, tokenizer, limit, 3 if options.rows is None else options.rows)


class Parser(argparse.ArgumentParser):
    """Answers what it cannot read with one line."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message.removeprefix('argument ')}; `python dataset.py --help` lists all arguments")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python dataset.py", description="See rows as they are trained.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for main.py")
    parser.add_argument("--rows", type=int, metavar="N", help="rows that are shown: by default 3, with --json all")
    parser.add_argument("--json", action="store_true", help="one object a row, with its tokens and labels")
    options = parser.parse_intermixed_args(arguments)
    if options.rows is not None and options.rows < 0:
        raise SettingsError(f"--rows={options.rows}: use a number of at least 0")
    return options


def tokenizer_for(config: Any, overrides: Sequence[str]) -> Any:
    """The model's tokenizer; where the default model's cannot be loaded, the bundled one, with a warning."""
    from model import read_tokenizer

    try:
        return read_tokenizer(config.model)
    except (SettingsError, RunError) as error:
        if any(text.lstrip("+").startswith(("model", "experiment")) for text in overrides):
            raise
        print(f"warning: {error}; tokens are those of the bundled model: name yours with model.name=", file=sys.stderr)
        return read_tokenizer(replace(config.model, name="quickstart/model"))


def main() -> int:
    from settings.compose import one_line
    from utils import leave_unusable_home, quiet_transformers, send_nothing_home

    send_nothing_home()
    leave_unusable_home()
    quiet_transformers()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal need not know every character
    try:
        show(parse(sys.argv[1:]))
    except (SettingsError, RunError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
