"""All arrays of a message as one: Flower sends each in requests of its own, which takes longer than their bytes do."""

from math import prod
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

FOLDED, LAYOUT = "folded", "layout"
KINDS = ("float32", "float16", "int8")


Fold = tuple[ArrayRecord, ConfigRecord]


def folded(content: RecordDict, known: dict[tuple[int, ...], Fold] | None = None) -> RecordDict:
    """`content` with the bytes of all its arrays in one, and their names, types and shapes beside it.

    Args:
        known: what was folded before, by the ids of records that are still there; it is added to.
    """
    records = content.array_records
    if not records:
        return content
    key = tuple(map(id, records.values()))
    found = known.get(key) if known is not None else None
    fold = found or fold_of(content)
    if known is not None:
        known[key] = fold
    others: dict[str, Any] = {name: record for name, record in content.items() if name not in records}
    return RecordDict(others | {FOLDED: fold[0], LAYOUT: fold[1]})


def fold_of(content: RecordDict) -> Fold:
    records = content.array_records
    places = [(key, name, array.numpy()) for key, record in records.items() for name, array in record.items()]
    layout = {
        "records": [key for key, _, _ in places],
        "names": [name for _, name, _ in places],
        "kinds": [value.dtype.name for _, _, value in places],
        "shapes": [",".join(map(str, value.shape)) for _, _, value in places],
    }
    whole = np.frombuffer(b"".join(value.tobytes() for _, _, value in places), np.uint8)
    return ArrayRecord({"bytes": Array(whole)}), ConfigRecord(cast(Any, layout))


def unfolded(content: RecordDict) -> RecordDict:
    """What `folded` was given; `content` itself if it is not folded.

    Raises:
        ValueError: if its layout does not fit its bytes.
    """
    if FOLDED not in content.array_records or LAYOUT not in content.config_records:
        return content
    layout, whole = cast(Any, content[LAYOUT]), content.array_records[FOLDED]["bytes"].numpy()
    records: dict[str, dict[str, Array]] = {}
    position = 0
    columns = [layout[name] for name in ("records", "names", "kinds", "shapes")]
    for key, name, kind, shape in zip(*columns, strict=True):
        if kind not in KINDS:
            raise ValueError(f"folded arrays of {str(kind)[:20]}; {', '.join(KINDS)} are used here")
        dimensions = tuple(int(text) for text in shape.split(",") if text)
        size = prod(dimensions) * np.dtype(kind).itemsize
        part = whole[position : position + size]
        if min(dimensions, default=1) < 0 or len(part) != size:
            raise ValueError("folded arrays are shorter than their layout says")
        records.setdefault(key, {})[name] = Array(part.view(kind).reshape(dimensions))
        position += size
    if whole.dtype != np.uint8 or position != len(whole):
        raise ValueError("folded arrays are longer than their layout says")
    others: dict[str, Any] = {key: record for key, record in content.items() if key not in (FOLDED, LAYOUT)}
    return RecordDict(others | {key: ArrayRecord(arrays) for key, arrays in records.items()})
