"""How an adapter travels: whole, in float32; or as its difference from what the other side has, in less.

The server sends differences from the initial adapter, which every client can make itself; a client answers with the
difference from what it received. Only differences are ever rounded, and the server adds them to its own exact adapter.
"""

import functools
import hashlib
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from safetensors.numpy import save

from model import Adapter

FORMS: dict[str, tuple[Any, float]] = {"fp16": (np.float16, 1), "int8": (np.int8, 127)}
"""What differences travel as, and the number that the largest of a row becomes."""


def encode(adapter: Adapter, known: Adapter, form: str) -> dict[str, np.ndarray]:
    """The arrays that travel for `adapter`, by name, sorted; the receiver adds differences to what is `known` to it.

    `fp32` sends `adapter` as it is. `fp16` and `int8` send one vector with all differences, in the order of their
    names, over a scale for each row of the smaller dimension of a tensor (a LoRA rank), so that its largest entry is 1
    or 127.
    """
    if form == "fp32":
        return {name: np.ascontiguousarray(adapter[name]) for name in sorted(adapter)}
    kind, largest = FORMS[form]
    scales, values = [], []
    for name in sorted(adapter):
        difference = adapter[name] - known[name]
        axes = tuple(axis for axis, count in enumerate(scale_shape(difference.shape)) if count == 1)
        scale = (np.abs(difference).max(axis=axes, keepdims=True) / largest).astype(np.float32)
        value = np.clip(difference / np.where(scale > 0, scale, 1), -largest, largest)
        scales.append(scale.ravel())
        values.append((np.rint(value) if form == "int8" else value).astype(kind).ravel())
    return {"scales": np.concatenate(scales), "values": np.concatenate(values)}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor's scales: one for each row along its smaller dimension, or one for a vector."""
    smaller = int(np.argmin(shape)) if len(shape) > 1 else -1
    return tuple(count if axis == smaller else 1 for axis, count in enumerate(shape))


def decode(arrays: Mapping[str, np.ndarray], known: Adapter, form: str) -> Adapter:
    """The adapter that `encode` was given, as far as `form` kept it.

    Raises ValueError if `arrays` are not what `encode` makes for an adapter like `known`.
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
    adapter, values, scales = {}, arrays["values"], arrays["scales"]
    for name, value in sorted(known.items()):
        shape = scale_shape(value.shape)
        difference, values = values[: value.size], values[value.size :]
        scale, scales = scales[: prod(shape)], scales[prod(shape) :]
        adapter[name] = value + difference.reshape(value.shape).astype(np.float32) * scale.reshape(shape)
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
    return hashlib.sha256(save(adapter)).hexdigest()


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Arrays as a Flower record, sorted by name: some strategies align them by position."""
    return ArrayRecord({name: Array(arrays[name]) for name in sorted(arrays)})


def arrays_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    """What `to_record` was given."""
    return {name: array.numpy() for name, array in record.items()}


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
        adapter = arrays_of(arrays)
        return (arrays if self.form == "fp32" else to_record(encode(adapter, self.initial, self.form))), adapter

    def unpack(self, partition: int, reply: Message) -> Message:
        """`reply` with its adapter in float32; a reply without a usable one stays as it is, for the guard.

        Raises ValueError if it holds no difference from the adapter that was sent.
        """
        if self.form != "fp32" and reply.has_content() and len(records := reply.content.array_records) == 1:
            [(name, record)] = records.items()
            records[name] = to_record(decode(arrays_of(record), self.sent[partition], self.form))
        return reply
