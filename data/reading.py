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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from data.cells import WRITTEN, plain
from settings.schema import SettingsError
from utils import shortened

Row = Mapping[str, Any]
GZIP, ZSTD, LFS = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"version https://git-lfs"
BLOCK = 1 << 20  # characters, of JSON that is not in lines
BLANKS = re.compile(r"[ \t\r\n]*")  # of JSON
DELIMITERS = ",;\t|"


class Unreadable(SettingsError):
    """A file that cannot be read; the message names it, and the line."""


def rows_of(file: Path, name: str, kind: str, split: str, progress: Callable[[int], None]) -> Iterator[tuple[int, Row]]:
    """The rows of one file, in messages called `name`. `progress` is told the bytes of it that have been read.

    Raises:
        Unreadable: if it is broken, with the line.
    """
    try:
        with file.open("rb") as opened:
            watched = io.BufferedReader(Watched(opened, progress))
            if watched.peek(len(LFS))[: len(LFS)] == LFS:
                raise Unreadable(f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` there")
            if kind == "parquet":
                yield from read_parquet(opened, progress)
            elif kind == "arrow":
                opened.seek(0)
                yield from read_arrow(opened)
            else:
                stream = unpacked(watched)
                delimiters = DELIMITERS if ".tsv" not in file.name.lower() else "\t" + DELIMITERS
                yield from read_json(stream, split) if kind == "json" else read_csv(stream, delimiters)
    except Unreadable as error:
        raise Unreadable(f"{name} {error}" if name not in str(error) else str(error)) from error
    except (OSError, EOFError, ValueError, RecursionError, pa.ArrowException) as error:
        raise Unreadable(f"{name} cannot be read ({shortened(error, 300)})") from error


class Watched(io.RawIOBase):
    """A file that tells how far it has been read."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        self.file, self.progress = file, progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.progress(count)
        return int(count)


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


def read_json(stream: io.BufferedReader, split: str) -> Iterator[tuple[int, Row]]:
    """Objects: one a line, in an array, one after the other over several lines, or in a field of a single object."""
    if stream.peek(16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        found = json_values(Blocks(blocks_of(stream), 1))
    else:
        lines = lines_of(stream)
        first = next(((number, line) for number, line in lines if line.strip()), None)
        if first is None:
            return
        found = json_lines(first, lines) if is_object(first[1]) else json_values(rest_of(first, lines))
    start = list(itertools.islice(found, 2))
    if len(start) == 1 and (inner := rows_inside(start[0][1], split)) is not None:
        start = [(start[0][0], row) for row in inner]
    for number, row in itertools.chain(start, found):
        if not isinstance(row, dict):
            raise Unreadable(f"line {number} is not an object with the row's columns as fields")
        yield number, row


def is_object(line: str) -> bool:
    try:
        return isinstance(WRITTEN.decode(line.strip()), dict)
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
    }
    lists = {key: inner for key, inner in lists.items() if not {"role", "from"} & inner[0].keys()}
    return lists.get(split) if len(lists) > 1 else next(iter(lists.values()), None)


def json_lines(first: tuple[int, str], lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, line in itertools.chain([first], lines):
        try:
            if text := line.strip():
                yield number, WRITTEN.decode(text)
        except json.JSONDecodeError as error:
            raise Unreadable(f"line {number} is not JSON ({error.msg} at character {error.pos + 1})") from error
        except ValueError as error:
            raise Unreadable(f"line {number} cannot be used: {error}") from error


def rest_of(first: tuple[int, str], lines: Iterator[tuple[int, str]]) -> "Blocks":
    """What is left of a file whose first line is no object by itself.

    Raises:
        Unreadable: if the next one is: then it is a file of lines, and the first is broken.
    """
    second = next(((number, line) for number, line in lines if line.strip()), (0, ""))
    if is_object(second[1]):
        raise Unreadable(f"line {first[0]} is not JSON")
    between = "\n" * (second[0] - first[0] - 1)  # blank lines
    return Blocks(itertools.chain([first[1], between, second[1]], (line for _, line in lines)), first[0])


def blocks_of(stream: io.BufferedReader) -> Iterator[str]:
    decoder, number = codecs.getincrementaldecoder("utf-8-sig")(), 1
    while True:
        block = stream.read(BLOCK)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            number += error.object.count(b"\n", 0, error.start)
            raise Unreadable(f"line {number} is not UTF-8 text; save the file as UTF-8") from error
        number += text.count("\n")
        yield text
        if not block:
            return


def json_values(text: "Blocks") -> Iterator[tuple[int, Any]]:
    """The entries of an array, or objects one after the other, however they are broken into lines."""
    in_array = text.peek() == "["
    if in_array:
        text.take("[")
    while (character := text.peek()) and not (in_array and character == "]"):
        yield text.line, text.value()
        if in_array and text.peek() != "]":
            text.take(",")
            if text.peek() == "]":
                raise Unreadable(f"line {text.line} is not JSON (a comma stands before the end of the array)")
    if in_array:
        text.take("]")
        if text.peek():
            raise Unreadable(f"line {text.line} is not JSON (something stands behind the end of the array)")


class Blocks:
    """Text that is read block by block, from which JSON values are taken; `line` is where it stands."""

    def __init__(self, parts: Iterator[str], line: int) -> None:
        self.parts, self.text, self.place, self.line = parts, "", 0, line

    def more(self) -> bool:
        """Read on; False at the end. As much again as is waiting, because a value may be long."""
        wanted, parts = max(BLOCK, len(self.text) - self.place), [self.text[self.place :]]
        before = len(parts[0])
        for part in self.parts:
            parts.append(part)
            wanted -= len(part)
            if wanted <= 0:
                break
        self.text, self.place = "".join(parts), 0
        return len(self.text) > before

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
                value, end = WRITTEN.raw_decode(self.text, self.place)
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

    Args:
        delimiters: the one that makes most fields of the header is taken, the first of several.

    Raises:
        Unreadable: if a row has more fields than the header, or quotes do not close.
    """
    csv.field_size_limit(sys.maxsize)
    lines = Numbered(stream)
    start = next((line for line in lines if line.strip()), "")
    if "\r" in start.rstrip("\r\n"):
        raise Unreadable("has lines that end with a carriage return alone; save it with line feeds (LF or CRLF)")
    if directive := re.fullmatch(r"sep=(.)\r?\n", start):  # as Excel writes it
        start, delimiter = next(lines, ""), directive[1]
    else:
        delimiter = max(delimiters, key=lambda mark: len(next(csv.reader([start], delimiter=mark), [])))
    reader, number = csv.reader(itertools.chain([start], lines), delimiter=delimiter, strict=True), lines.number
    try:
        header = names_of(next(reader, []), number)
        while True:
            number = lines.number + 1
            fields = next(reader, None)
            if fields is None:
                return
            if len(fields) > len(header):
                raise Unreadable(
                    f"line {number} has {len(fields)} fields, the header {len(header)}: put fields that hold "
                    f"{delimiter!r} in quotes, or remove what is too much"
                )
            if fields:
                yield number, {name: field for name, field in zip(header, fields, strict=False) if name}
    except csv.Error as error:
        raise Unreadable(f"line {number} is not CSV ({error})") from error


class Numbered:
    """Lines, and the number of the last one that was taken."""

    def __init__(self, stream: Iterable[bytes]) -> None:
        self.lines, self.number = lines_of(stream), 0

    def __iter__(self) -> "Numbered":
        return self

    def __next__(self) -> str:
        self.number, line = next(self.lines)
        return line


def names_of(header: Sequence[str], number: int) -> list[str]:
    names = [name.strip() for name in header]
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise Unreadable(f"line {number} names the column {min(twice)} twice")
    return names


# --- typed files ----------------------------------------------------------------------------------


def read_parquet(file: IO[bytes], progress: Callable[[int], None]) -> Iterator[tuple[int, Row]]:
    opened = pq.ParquetFile(file)
    groups = max(opened.num_row_groups, 1)
    size = file.seek(0, 2)

    def batches() -> Iterator[pa.RecordBatch]:
        for group in range(opened.num_row_groups):
            yield from opened.iter_batches(batch_size=1000, row_groups=[group])
            progress(size // groups)

    yield from cells_of(batches(), opened.schema_arrow)


def read_arrow(file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    start = file.read(6)
    file.seek(0)
    if start == b"ARROW1":
        whole = pa.ipc.open_file(file)
        batches: Iterable[pa.RecordBatch] = (whole.get_batch(i) for i in range(whole.num_record_batches))
    else:
        batches = whole = pa.ipc.open_stream(file)
    yield from cells_of(batches, whole.schema)


def cells_of(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[tuple[int, Row]]:
    """Rows of typed columns as text, labels by their names."""
    if twice := {name for name in schema.names if schema.names.count(name) > 1}:
        raise Unreadable(f"names the column {min(twice)} twice")
    number, typed = 0, b"huggingface" in (schema.metadata or {})  # where `datasets` notes its own types
    features = Features.from_arrow_schema(schema) if typed else dict.fromkeys(schema.names)
    names = {column: names_in(feature) for column, feature in features.items()}
    for batch in batches:
        columns = [
            plain(map(names[field.name], column.to_pylist()), field.type)
            for field, column in zip(schema, batch.columns, strict=True)
        ]
        for cells in zip(*columns, strict=True):
            number += 1
            yield number, dict(zip(schema.names, cells, strict=True))


def names_in(feature: Any) -> Callable[[Any], Any]:
    """What makes names of the labels in a column, and leaves any other value alone."""
    if isinstance(feature, ClassLabel):
        return lambda value: feature.names[value] if value is not None and 0 <= value < feature.num_classes else None
    if isinstance(getattr(feature, "feature", None), ClassLabel):
        inner = names_in(feature.feature)
        return lambda value: [inner(entry) for entry in value] if isinstance(value, list) else value
    return lambda value: value


def cells_of_rows(rows: Any, progress: Callable[[int], None]) -> Iterator[tuple[int, Row]]:
    """The rows of a `datasets.Dataset`, such as one of the Hub, as text."""
    table = rows.with_format("arrow")
    batches = (part for block in table.iter(1000) for part in block.to_batches())
    for number, row in cells_of(batches, rows.features.arrow_schema):
        progress(1)
        yield number, row
