"""What stands in one cell of a file, as text: a number as it is written there, and never what a reader makes of it.

A cell is None, text, a number, a truth value, or nested (a list or an object).
"""

import json
from decimal import Decimal
from json.encoder import encode_basestring
from typing import Any

import numpy as np
import pyarrow as pa

TEXT, NUMBER, TRUTH, LIST, OBJECT, BYTES = "text", "numbers", "true or false", "lists", "objects", "bytes"
NESTED = (LIST, OBJECT)


class Float(float):
    """A number, for templates that count with it; as text it is what was written: 1.50, 1e3, NaN."""

    written: str

    def __new__(cls, written: str) -> "Float":
        made = super().__new__(cls, written)
        made.written = written
        return made

    def __str__(self) -> str:
        return self.written


def whole(text: str) -> int | Float:
    return int(text) if len(text) < 1000 and str(int(text)) == text else Float(text)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is named twice")
    return made


JSON = json.JSONDecoder(parse_int=whole, parse_float=Float, parse_constant=Float, object_pairs_hook=once)
"""Numbers count as such, and are written as they were."""


def told(value: Any) -> tuple[str, str | None]:
    """The kind of a cell, and its text: JSON for a nested one, and none for bytes."""
    if isinstance(value, str):
        return TEXT, value
    if isinstance(value, bool):
        return TRUTH, text_of(value)
    if isinstance(value, int | float):
        return NUMBER, str(value)
    if isinstance(value, list | dict):
        return LIST if isinstance(value, list) else OBJECT, written(value)
    return BYTES, None


def written(value: Any) -> str:
    """A cell as JSON, its numbers as they are written; of bytes in it, which are no text, only how many there are."""
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{encode_basestring(key)}: {written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, bytes):
        return f'{{"bytes": {len(value)}}}'
    return "null" if value is None else text_of(value)


def object_in(line: str) -> dict[str, Any]:
    """The cells of a line of JSON. Raises ValueError if it is none, no object, or holds half a character."""
    row = JSON.decode(line.strip())
    if not isinstance(row, dict):
        raise ValueError("it is something else")
    written(row).encode()
    return row


def text_of(value: Any) -> str:
    """Text of what a message or a cell holds; nothing is no text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def as_cell(value: Any, kind: pa.DataType | None = None) -> Any:
    """A value of a typed file (Parquet, Arrow) as a cell.

    Args:
        kind: its type there. Floats of 16 or 32 bits are written with the digits that tell those apart.
    """
    if value is None or isinstance(value, bool | str | int | bytes):
        return value
    if isinstance(value, float):
        is_short = kind is not None and (pa.types.is_float32(kind) or pa.types.is_float16(kind))
        return Float(str(np.float32(value)) if is_short else repr(value))
    if isinstance(value, Decimal):
        return Float(format(value, "f"))
    if isinstance(value, dict):
        kinds = {field.name: field.type for field in kind} if isinstance(kind, pa.StructType) else {}
        return {str(key): as_cell(inner, kinds.get(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [as_cell(inner, getattr(kind, "value_type", None)) for inner in value]
    return str(value)  # dates and times among others
