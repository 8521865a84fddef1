"""Rows of files, one after the other, each cell as it stands there; an error names the file and the line.

A reader yields the number of the line (or row) at which a row begins, and the row by column. Nothing is guessed: no
reader knows dates, and none makes a float of a number.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from data.cells import JSON, as_cell
from data.table import Place
from settings.schema import SettingsError
from utils import is_lfs_pointer, shortened

Row = Mapping[str, Any]
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BLOCK = 1 << 20  # characters, of JSON that is not in lines
BLANKS = re.compile(r"[ \t\r\n]*")  # of JSON
DELIMITERS = ",;\t|"


class Unreadable(SettingsError):
    """A file that cannot be read; the message names it, and the line."""


def rows_of(
    file: Path, name: str, kind: str, split: str, progress: Callable[[int], Any]
) -> Iterator[tuple[Place, Row]]:
    """The rows of one file, in messages called `name`. `progress` is told how many bytes further its reading is.

    Raises Unreadable if it is broken, with the line.
    """
    place = 0
    try:
        if is_lfs_pointer(file):
            raise Unreadable(f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` there")
        with file.open("rb") as opened:
            for number, row in read(file, opened, kind, split):
                yield (name, number), row
                before, place = place, opened.tell()
                progress(place - before)
    except Unreadable as error:
        raise Unreadable(f"{name} {error}" if name not in str(error) else str(error)) from error
    except (OSError, EOFError, ValueError, RecursionError, pa.ArrowException) as error:
        raise Unreadable(f"{name} cannot be read ({shortened(error, 300)})") from error


def read(file: Path, opened: io.BufferedReader, kind: str, split: str) -> Iterator[tuple[int, Row]]:
    if kind == "parquet":
        typed = pq.ParquetFile(opened)
        return cells_of(typed.iter_batches(batch_size=1000), typed.schema_arrow)
    if kind == "arrow":
        return read_arrow(opened)
    if kind == "csv":
        return read_csv(unpacked(opened), DELIMITERS if ".tsv" not in file.name.lower() else "\t" + DELIMITERS)
    return read_json(unpacked(opened), is_in_lines(file), split)


def unpacked(stream: Any) -> io.BufferedReader:
    """The content of a compressed file, or the file itself: its first bytes say which."""
    start = stream.peek(4)[:4]
    if start[:2] == GZIP:
        return io.BufferedReader(gzip.GzipFile(fileobj=stream))  # type: ignore[type-var]
    if start == ZSTD:
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"))  # type: ignore[arg-type]
    return stream


def lines_of(stream: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, without a byte order mark."""
    for number, line in enumerate(stream, start=1):
        if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise Unreadable("is text in UTF-16; save it as UTF-8")
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise Unreadable(f"line {number} is not UTF-8 text; save the file as UTF-8") from error


# --- JSON -----------------------------------------------------------------------------------------


def read_json(stream: io.BufferedReader, in_lines: bool, split: str) -> Iterator[tuple[int, Row]]:
    """Objects: one a line, in an array, one after the other over several lines, or in a field of a single object."""
    blocks = None if in_lines else Blocks(stream)  # which closes the file when it goes
    found = blocks.values() if blocks else json_lines(stream)
    start = list(itertools.islice(found, 2))
    if len(start) == 1 and (inner := rows_inside(start[0][1], split)) is not None:
        start = [(start[0][0], row) for row in inner]
    for number, row in itertools.chain(start, found):
        if not isinstance(row, dict):
            raise Unreadable(f"line {number} is not an object with the row's columns as fields")
        yield number, row


def is_in_lines(file: Path) -> bool:
    """Whether a row stands in each line: of the first two, one that is broken is not the only one that is an object."""
    with file.open("rb") as opened:
        stream = unpacked(opened)
        if stream.peek(16).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return False
        return any(map(is_object, itertools.islice((line for _, line in lines_of(stream) if line.strip()), 2)))


def is_object(line: str) -> bool:
    try:
        return isinstance(JSON.decode(line.strip()), dict)
    except (ValueError, RecursionError):
        return False


def rows_inside(value: Any, split: str) -> list[Any] | None:
    """The rows of an object such as {"data": [...]}: of a list of objects in it that is no conversation."""
    if not isinstance(value, dict) or {"instruction", "prompt", "text"} & value.keys():
        return None
    lists = {
        key: inner
        for key, inner in value.items()
        if isinstance(inner, list) and inner and all(isinstance(entry, dict) for entry in inner)
        if not {"role", "from"} & inner[0].keys()
    }
    return lists.get(split) if len(lists) > 1 else next(iter(lists.values()), None)


def json_lines(stream: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in lines_of(stream):
        try:
            if text := line.strip():
                yield number, JSON.decode(text)
        except json.JSONDecodeError as error:
            raise Unreadable(f"line {number} is not JSON ({error.msg} at character {error.pos + 1})") from error
        except ValueError as error:
            raise Unreadable(f"line {number} cannot be used: {error}") from error


class Blocks:
    """Text that is read block by block, from which JSON values are taken; `line` is where it stands."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="\n")
        self.text, self.place, self.line = "", 0, 1

    def values(self) -> Iterator[tuple[int, Any]]:
        """The entries of an array, or objects one after the other, however they are broken into lines."""
        in_array = self.peek() == "["
        if in_array:
            self.take("[")
        while (character := self.peek()) and not (in_array and character == "]"):
            yield self.line, self.value()
            if in_array and self.peek() != "]":
                self.take(",")
                if self.peek() == "]":
                    raise Unreadable(f"line {self.line} is not JSON (a comma stands before the end of the array)")
        if in_array:
            self.take("]")
            if self.peek():
                raise Unreadable(f"line {self.line} is not JSON (something stands behind the end of the array)")

    def more(self) -> bool:
        """Read on; False at the end. As much again as is waiting, because a value may be long."""
        waiting = self.text[self.place :]
        found = self.stream.read(max(BLOCK, len(waiting)))
        try:
            found.encode()
        except UnicodeEncodeError as error:  # of what `surrogateescape` made of a byte
            line = self.line + waiting.count("\n") + found.count("\n", 0, error.start)
            raise Unreadable(f"line {line} is not UTF-8 text; save the file as UTF-8") from error
        self.text, self.place = waiting + found, 0
        return bool(found)

    def forward(self, end: int) -> None:
        self.line += self.text.count("\n", self.place, end)
        self.place = end

    def peek(self) -> str:
        """The next character that is no blank, empty at the end."""
        while True:
            self.forward(BLANKS.match(self.text, self.place).end())  # type: ignore[union-attr]
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def take(self, character: str) -> None:
        if (found := self.peek()) != character:
            raise Unreadable(f"line {self.line} is not JSON ({character!r} expected, {found or 'the end'!r} found)")
        self.forward(self.place + 1)

    def value(self) -> Any:
        """The next value. At the end of what was read, it is tried again with more."""
        while True:
            try:
                value, end = JSON.raw_decode(self.text, self.place)
                if end < len(self.text) or not self.more():  # a number could go on
                    self.forward(end)
                    return value
            except json.JSONDecodeError as error:
                message, line = error.msg, self.line + self.text.count("\n", self.place, error.pos)
                cut_off = error.pos > len(self.text) - 12 or message.startswith("Unterminated string")
                if not cut_off or not self.more():
                    raise Unreadable(f"line {line} is not JSON ({message})") from error
            except ValueError as error:
                raise Unreadable(f"line {self.line} cannot be used: {error}") from error


# --- CSV ------------------------------------------------------------------------------------------


def read_csv(stream: Iterable[bytes], delimiters: str) -> Iterator[tuple[int, Row]]:
    """Rows of text. A column without a name, such as the index that pandas writes, is left out.

    Of `delimiters` the one that makes most fields of the header is taken, the first of several.
    """
    csv.field_size_limit(sys.maxsize)
    lines = lines_of(stream)
    first, start = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    if "\r" in start.rstrip("\r\n"):
        raise Unreadable("has lines that end with a carriage return alone; save it with line feeds (LF or CRLF)")
    if directive := re.fullmatch(r"sep=(.)\r?\n", start):  # as Excel writes it
        (first, start), delimiter = next(lines, (first, "")), directive[1]
    else:
        delimiter = max(delimiters, key=lambda mark: len(next(csv.reader([start], delimiter=mark), [])))
    text = itertools.chain([start], (line for _, line in lines))
    number, reader = first, csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := {name for name in header if name and header.count(name) > 1}:
            raise Unreadable(f"line {number} names the column {min(twice)} twice")
        number = first + reader.line_num
        for fields in reader:
            if len(fields) > len(header):
                raise Unreadable(
                    f"line {number} has {len(fields)} fields, the header {len(header)}: put fields that hold "
                    f"{delimiter!r} in quotes, or remove what is too much"
                )
            if fields:
                yield number, {name: field for name, field in zip(header, fields, strict=False) if name}
            number = first + reader.line_num
    except csv.Error as error:
        raise Unreadable(f"line {number} is not CSV ({error})") from error


# --- typed files ----------------------------------------------------------------------------------


def read_arrow(file: io.BufferedReader) -> Iterator[tuple[int, Row]]:
    if file.peek(6).startswith(b"ARROW1"):
        whole = pa.ipc.open_file(file)
        batches: Iterable[pa.RecordBatch] = (whole.get_batch(i) for i in range(whole.num_record_batches))
    else:
        batches = whole = pa.ipc.open_stream(file)
    yield from cells_of(batches, whole.schema)


def cells_of(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[tuple[int, Row]]:
    """Rows of typed columns as text, labels by their names."""
    if twice := {name for name in schema.names if schema.names.count(name) > 1}:
        raise Unreadable(f"names the column {min(twice)} twice")
    typed = b"huggingface" in (schema.metadata or {})  # where `datasets` notes its own types
    features = Features.from_arrow_schema(schema) if typed else dict.fromkeys(schema.names)
    names = {column: names_in(feature) for column, feature in features.items()}
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
        yield number, {field.name: as_cell(names[field.name](row[field.name]), field.type) for field in schema}


def names_in(feature: Any) -> Callable[[Any], Any]:
    """What makes names of the labels in a column, and leaves any other value alone."""
    if isinstance(feature, ClassLabel):
        return lambda value: feature.names[value] if value is not None and 0 <= value < feature.num_classes else None
    if isinstance(getattr(feature, "feature", None), ClassLabel):
        inner = names_in(feature.feature)
        return lambda value: [inner(entry) for entry in value] if isinstance(value, list) else value
    return lambda value: value
