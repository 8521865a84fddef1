"""All rows of a data set as one table of text, in main memory or, if they are many, in a file that is mapped.

Columns are the user's own. What kinds of cells a column holds is noted beside it, with where each kind first stands:
nobody has to guess from the first rows.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from data.cells import told
from settings.schema import RunError, SettingsError

log = logging.getLogger(__name__)

BATCH_BYTES, BATCH_ROWS = 8 << 20, 5000
KEPT_BYTES = 64 << 20  # of text in main memory; more of it lies in a file
LINE_S = 30.0  # between two lines about a long reading, where there is no terminal

Place = tuple[str, int]
"""A file's name, and the number of a line in it."""
Kinds = Mapping[str, Mapping[str, str]]
"""By column: the kinds of its cells, each with the place of the first."""


@dataclass(frozen=True)
class Table:
    """Rows of text: `columns` has a string column for each of the data's, with JSON for lists and objects."""

    columns: pa.Table
    kinds: Kinds
    files: Sequence[tuple[int, str]] = ()
    """Where they are from: the number of rows before each file, and its name."""


class TableWriter:
    """Collects rows whose columns may come and go."""

    def __init__(self) -> None:
        self.cells: dict[str, list[str | None]] = {}
        self.places: list[Place] = []
        self.files: list[tuple[int, str]] = []
        self.flushed = 0
        self.kinds: dict[str, dict[str, str]] = {}
        self.count = self.size = self.kept_size = 0
        self.kept: list[pa.Table] = []
        self.spool: Spool | None = None

    def add(self, place: Place, row: Mapping[str, Any]) -> None:
        """A row, and the file and line that it is from.

        Raises:
            SettingsError: for half a character of UTF-16, which is no text, or a name that no table can have.
        """
        count, cells = self.count, self.cells
        for name, value in row.items():
            column = cells.get(name)
            if column is None:
                if "\0" in name:
                    raise SettingsError(f"{at(place)} names a column with a NUL character; is it text in UTF-8?")
                column = cells[name] = [None] * count
                self.kinds.setdefault(name, {})
            elif len(column) < count:
                column.extend([None] * (count - len(column)))
            if value is not None:
                kind, text = told(value)
                if kind not in self.kinds[name]:
                    self.kinds[name][kind] = at(place)
                self.size += len(text or "")
                value = text
            column.append(value)
        if not self.files or self.files[-1][1] != place[0]:
            self.files.append((self.flushed + self.count, place[0]))
        self.count += 1
        self.places.append(place)
        if self.size > BATCH_BYTES or self.count == BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        if self.count and not self.cells:  # rows without any column
            self.cells[next(iter(self.kinds), "")] = []
        for column in self.cells.values():
            column.extend([None] * (self.count - len(column)))
        if self.count:
            try:
                part = pa.table({name: pa.array(cells, pa.string()) for name, cells in self.cells.items()})
            except (UnicodeEncodeError, pa.ArrowException) as error:
                raise SettingsError(half_in(self.cells, self.places)) from error
            self.keep(part)
        self.flushed += self.count
        self.cells, self.places, self.count, self.size = {}, [], 0, 0

    def keep(self, part: pa.Table) -> None:
        self.kept_size += part.nbytes
        if self.spool is None and self.kept_size > KEPT_BYTES:
            self.spool = Spool.opened()
            for earlier in self.kept if self.spool else []:
                self.spool.write(earlier)  # type: ignore[union-attr]
            self.kept = [] if self.spool else self.kept
        if self.spool:
            self.spool.write(part)
        else:
            self.kept.append(part)

    def finish(self) -> Table:
        self.flush()
        parts = self.spool.read() if self.spool else self.kept
        columns = pa.concat_tables(parts, promote_options="default") if parts else pa.table({})
        return Table(columns.replace_schema_metadata(None), self.kinds, self.files)


def half_in(cells: Mapping[str, list[str | None]], at_rows: Sequence[Place]) -> str:
    """What is no text, and where it stands: a column's name where the first row of these has that column."""
    for name, column in cells.items():
        first = next((number for number, text in enumerate(column) if text is not None), 0)
        for number, text in ((first, name), *enumerate(column)):
            try:
                (text or "").encode()
            except UnicodeEncodeError as error:
                what = f"\\u{ord(error.object[error.start]):04x} in the column {name.encode(errors='replace').decode()}"
                return f"{at(at_rows[number])} holds half a character ({what}), which is no text"
    return f"the rows up to {at(at_rows[-1])} hold what is no text"


class Spool:
    """A file without a name, which is gone when nobody maps it any more."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.stream: Any = None

    @classmethod
    def opened(cls) -> "Spool | None":
        """None where no file can be written: then the rows stay in main memory."""
        try:
            descriptor, path = tempfile.mkstemp(prefix="flowertune-rows-")
            os.close(descriptor)
            return cls(Path(path), pa.OSFile(path, "wb"))
        except OSError as error:
            log.warning("rows are kept in main memory: %s", error)
            return None

    def write(self, part: pa.Table) -> None:
        try:
            if self.stream is None or self.stream[0] != part.schema:
                self.end_stream()
                self.stream = part.schema, pa.ipc.new_stream(self.file, part.schema)
            self.stream[1].write_table(part)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise RunError(f"{self.path} cannot be written ({error}); make room there, or set TMPDIR") from error

    def end_stream(self) -> None:
        if self.stream:
            self.stream[1].close()

    def read(self) -> list[pa.Table]:
        self.end_stream()
        self.file.close()
        mapped, parts = pa.memory_map(str(self.path)), []
        self.path.unlink()
        while mapped.tell() < mapped.size():
            parts.append(pa.ipc.open_stream(mapped).read_all())
        return parts


class Reading:
    """How far a reading has come, once it takes long: a bar on a terminal, elsewhere a line every half minute."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.done = name, total, 0
        self.live, self.said = sys.stderr.isatty(), time.monotonic()
        look = {"unit_scale": True, "delay": 2, "leave": False, "file": sys.stderr}
        self.bar = tqdm(total=total, desc=f"reading {name}", unit=unit, disable=not self.live, **look)

    def __call__(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        if not self.live and time.monotonic() - self.said > LINE_S:
            print(f"reading {self.name}: {min(self.done / max(self.total, 1), 1):.0%}", file=sys.stderr, flush=True)
            self.said = time.monotonic()

    def close(self) -> None:
        self.bar.close()


def at(place: Place) -> str:
    return f"{place[0]} line {place[1]}"


def table_of(rows: Iterable[tuple[Place, Mapping[str, Any]]]) -> Table:
    """All `rows`, each with the file and line that it is from, as one table."""
    writer = TableWriter()
    for place, row in rows:
        try:
            writer.add(place, row)
        except RecursionError as error:
            raise SettingsError(f"{at(place)} holds lists or objects that are nested too deeply") from error
    return writer.finish()


def places(name: str, rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[Place, Any]]:
    for number, row in rows:
        yield (name, number), row
