"""How an adapter travels: whole, in float32; or as its difference from what the other side has, in less.

The server sends differences from the initial adapter, which every client can make itself; a client answers with
the difference from what it received. Only differences are ever rounded, and the server adds them to its own
exact adapter. Whatever arrives is decoded to float32 before it is checked.
"""

import functools
import hashlib
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from model import Adapter

FORMS: dict[str, tuple[Any, float]] = {"fp16": (np.float16, 1), "int8": (np.int8, 127)}
"""What differences travel as, and the number that the largest of a row becomes."""


def encode(adapter: Adapter, known: Adapter, form: str) -> dict[str, np.ndarray]:
    """The arrays that travel for `adapter`, by name, sorted.

    Args:
        known: the adapter that the receiver adds the difference to; same names and shapes.
        form: `fp32` sends `adapter` as it is. `fp16` and `int8` send one vector with all differences, in the
            order of their names, over a scale for each row of the smaller dimension of a tensor (a LoRA rank), so
            that its largest entry is 1 or 127.
    """
    if form == "fp32":
        return {name: np.ascontiguousarray(adapter[name]) for name in sorted(adapter)}
    kind, largest = FORMS[form]
    scales, values = [], []
    for name in sorted(adapter):
        difference = adapter[name] - known[name]
        scale = scale_of(difference, largest)
        value = np.clip(difference / np.where(scale > 0, scale, 1), -largest, largest)
        scales.append(scale.ravel())
        values.append((np.rint(value) if form == "int8" else value).astype(kind).ravel())
    return {"scales": np.concatenate(scales), "values": np.concatenate(values)}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor's scales: one for each row along its smaller dimension, or one for a vector."""
    smaller = int(np.argmin(shape)) if len(shape) > 1 else -1
    return tuple(count if axis == smaller else 1 for axis, count in enumerate(shape))


def scale_of(difference: np.ndarray, largest: float) -> np.ndarray:
    """What each row is divided by, so that none of its entries is above `largest`."""
    axes = tuple(axis for axis, count in enumerate(scale_shape(difference.shape)) if count == 1)
    scale: np.ndarray = np.abs(difference).max(axis=axes, keepdims=True) / largest
    return scale.astype(np.float32)


def decode(arrays: Mapping[str, np.ndarray], known: Adapter, form: str) -> Adapter:
    """The adapter that `encode` was given, as far as `form` kept it.

    Raises:
        ValueError: if `arrays` are not what `encode` makes for an adapter like `known`.
    """
    if form == "fp32":
        return dict(arrays)
    wanted = {
        "scales": (np.float32, sum(prod(scale_shape(value.shape)) for value in known.values())),
        "values": (FORMS[form][0], sum(value.size for value in known.values())),
    }
    if set(arrays) != set(wanted):
        raise ValueError(f"holds other arrays than {', '.join(wanted)}")
    for name, (kind, size) in wanted.items():
        if arrays[name].dtype != kind or arrays[name].shape != (size,):
            raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}, not {np.dtype(kind)} ({size},)")
    adapter, position, row = {}, 0, 0
    for name, value in sorted(known.items()):
        difference = arrays["values"][position : position + value.size].reshape(value.shape).astype(np.float32)
        position += value.size
        shape = scale_shape(value.shape)
        adapter[name] = value + difference * arrays["scales"][row : row + prod(shape)].reshape(shape)
        row += prod(shape)
    return adapter


def payload_bytes(shapes: Mapping[str, tuple[int, ...]], form: str) -> int:
    """Bytes of the arrays that travel for an adapter of these shapes; numpy puts 128 before each."""
    size = sum(prod(shape) for shape in shapes.values())
    if form == "fp32":
        return 4 * size + 128 * len(shapes)
    scales = sum(prod(scale_shape(shape)) for shape in shapes.values())
    return np.dtype(FORMS[form][0]).itemsize * size + 4 * scales + 2 * 128


def digest(adapter: Adapter) -> str:
    """SHA-256 of all names and values: whether two sides hold the same adapter."""
    hashed = hashlib.sha256()
    for name in sorted(adapter):
        hashed.update(name.encode())
        hashed.update(adapter[name].tobytes())
    return hashed.hexdigest()


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Arrays as a Flower record, sorted by name: some strategies align them by position."""
    return ArrayRecord({name: Array(arrays[name]) for name in sorted(arrays)})


class Codec:
    """The border of the grid: adapters in float32 on this side, on the other in the form that `transfer` names."""

    def __init__(self, form: str, initial: Adapter) -> None:
        self.form, self.initial = form, initial
        self.sent: dict[int, Adapter] = {}  # by partition id: the adapter that the client was sent last

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """What a message says of its form: from which initial adapter the differences are taken."""
        return {} if self.form == "fp32" else {"initial-sha256": digest(self.initial)}

    def pack(self, arrays: ArrayRecord) -> tuple[ArrayRecord, Adapter]:
        """A strategy's adapter in the form in which it travels, and itself."""
        adapter = {name: array.numpy() for name, array in arrays.items()}
        if self.form == "fp32":
            return arrays, adapter
        return to_record(encode(adapter, self.initial, self.form)), adapter

    def unpack(self, partition: int, reply: Message) -> Message:
        """`reply` with its adapter in float32; a reply without a usable one stays as it is, for the guard.

        Raises:
            ValueError: if it holds no difference from the adapter that was sent.
        """
        records = list(reply.content.array_records.values()) if reply.has_content() else []
        if self.form == "fp32" or len(records) != 1:
            return reply
        arrays = {name: array.numpy() for name, array in records[0].items()}
        adapter = decode(arrays, self.sent[partition], self.form)
        reply.content.array_records[next(iter(reply.content.array_records))] = to_record(adapter)
        return reply
