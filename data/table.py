"""All rows of a data set as one table of text, in main memory or, if they are many, in a file that is mapped.

Columns are the user's own. What kinds of cells a column holds is noted beside it, with where each kind first stands:
nobody has to guess from the first rows.
"""

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.cells import told
from settings.schema import RunError, SettingsError

log = logging.getLogger(__name__)

BATCH_BYTES, BATCH_ROWS = 8 << 20, 5000
KEPT_BYTES = 64 << 20  # of text in main memory; more of it lies in a file

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
        self.rows: list[tuple[Place, dict[str, str | None]]] = []
        self.files: list[tuple[int, str]] = []
        self.kinds: dict[str, dict[str, str]] = {}
        self.count = self.size = 0
        self.kept: list[pa.Table] = []
        self.mapped: list[pa.Table] = []

    def add(self, place: Place, row: Mapping[str, Any]) -> None:
        """A row, and the file and line that it is from."""
        cells: dict[str, str | None] = {}
        for name, value in row.items():
            if name not in self.kinds:
                if "\0" in name:
                    raise SettingsError(f"{at(place)} names a column with a NUL character; is it text in UTF-8?")
                self.kinds[name] = {}
            cells[name] = None
            if value is not None:
                kind, text = told(value)
                if kind not in self.kinds[name]:
                    self.kinds[name][kind] = at(place)
                self.size += len(text or "")
                cells[name] = text
        if not self.files or self.files[-1][1] != place[0]:
            self.files.append((self.count, place[0]))
        self.count += 1
        self.rows.append((place, cells))
        if self.size > BATCH_BYTES or len(self.rows) == BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        rows = [cells for _, cells in self.rows]
        names = dict.fromkeys(name for cells in rows for name in cells) or [next(iter(self.kinds), "")]
        try:
            self.kept.append(pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in names])))
        except (UnicodeEncodeError, pa.ArrowException) as error:
            raise SettingsError(half_in(self.rows)) from error
        if sum(part.nbytes for part in self.kept) > KEPT_BYTES:
            self.mapped += in_a_file(self.kept)
            self.kept = []
        self.rows, self.size = [], 0

    def finish(self) -> Table:
        self.flush()
        columns = pa.concat_tables(self.mapped + self.kept, promote_options="default")
        return Table(columns.replace_schema_metadata(None), self.kinds, self.files)


def half_in(rows: Iterable[tuple[Place, Mapping[str, str | None]]]) -> str:
    """What is no text, and where it stands."""
    place: Place = ("", 0)
    for place, cells in rows:
        for name, text in cells.items():
            try:
                f"{name}{text}".encode()
            except UnicodeEncodeError as error:
                what = f"\\u{ord(error.object[error.start]):04x} in the column {name.encode(errors='replace').decode()}"
                return f"{at(place)} holds half a character ({what}), which is no text"
    return f"the rows up to {at(place)} hold what is no text"


def in_a_file(parts: list[pa.Table]) -> list[pa.Table]:
    """`parts` in a nameless file, which is gone when nobody maps it any more; as they are where none can be made."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="flowertune-rows-")
    except OSError as error:
        log.warning("rows are kept in main memory: %s", error)
        return parts
    os.close(descriptor)
    try:
        whole = pa.concat_tables(parts, promote_options="default")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, whole.schema) as stream:
            stream.write_table(whole)
        return [pa.ipc.open_stream(pa.memory_map(path)).read_all()]
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error}); make room there, or set TMPDIR") from error
    finally:
        Path(path).unlink(missing_ok=True)


def at(place: Place) -> str:
    return f"{place[0]} line {place[1]}"


def table_of(rows: Iterable[tuple[Place, Mapping[str, Any]]]) -> Table:
    """All `rows`, each with the file and line that it is from, as one table.

    Raises SettingsError for half a character of UTF-16, which is no text, or a name that no table can have.
    """
    writer = TableWriter()
    for place, row in rows:
        try:
            writer.add(place, row)
        except RecursionError as error:
            raise SettingsError(f"{at(place)} holds lists or objects that are nested too deeply") from error
    return writer.finish()
