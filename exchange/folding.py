"""All arrays of a message as one: Flower sends each in requests of its own, which takes longer than their bytes do."""

from collections import defaultdict
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors.numpy import load, save

FOLDED = "folded"


def folded(content: RecordDict, known: dict[tuple[int, ...], ArrayRecord] | None = None) -> RecordDict:
    """`content` with all its arrays as the bytes of one safetensors file, which names each `record/array`.

    What was folded is added to `known`, by the ids of records, and taken from there while these live.
    """
    records, known = content.array_records, {} if known is None else known
    if not records:
        return content
    if (key := tuple(map(id, records.values()))) not in known:
        arrays = {f"{kind}/{name}": array for kind, record in records.items() for name, array in record.items()}
        whole = save({name: np.asarray(array.numpy(), order="C") for name, array in arrays.items()})
        known[key] = ArrayRecord({"bytes": Array(np.frombuffer(whole, np.uint8))})
    others: dict[str, Any] = {name: record for name, record in content.items() if name not in records}
    return RecordDict(others | {FOLDED: known[key]})


def unfolded(content: RecordDict) -> RecordDict:
    """What `folded` was given, each record sorted by name; `content` itself if it is not folded.

    Raises SafetensorError if the bytes are not what their header says.
    """
    if FOLDED not in content.array_records:
        return content
    records: dict[str, dict[str, Array]] = defaultdict(dict)
    for name, array in sorted(load(content.array_records[FOLDED]["bytes"].numpy().tobytes()).items()):
        record, _, inner = name.partition("/")
        records[record][inner] = Array(array)
    others: dict[str, Any] = {name: record for name, record in content.items() if name != FOLDED}
    return RecordDict(others | {name: ArrayRecord(arrays) for name, arrays in records.items()})
