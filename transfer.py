"""How an adapter travels: whole, in float32; or as its difference from what the other side has, in less.

The server sends differences from the initial adapter, which every client can make itself; a client answers with
the difference from what it received. Only differences are ever rounded, and the server adds them to its own
exact adapter. Whatever arrives is decoded to float32 before it is checked.
"""

from collections.abc import Mapping
from math import prod

import numpy as np
from flwr.app import Array, ArrayRecord

from model import Adapter


def encode(adapter: Adapter, known: Adapter, form: str) -> dict[str, np.ndarray]:
    """The arrays that travel for `adapter`, by name, sorted.

    Args:
        known: the adapter that the receiver adds the difference to; same names and shapes.
        form: `fp32` sends `adapter` as it is. `fp16` and `int8` send one vector with all differences, in the
            order of their names; int8 with a scale for each row of the smaller dimension of a tensor (a LoRA
            rank), so that its largest entry is 127.
    """
    if form == "fp32":
        return {name: np.ascontiguousarray(adapter[name]) for name in sorted(adapter)}
    differences = [adapter[name] - known[name] for name in sorted(adapter)]
    if form == "fp16":
        return {"values": np.concatenate([d.ravel() for d in differences]).astype(np.float16)}
    scales = [scale_of(difference) for difference in differences]
    values = [np.clip(np.rint(d / np.where(s > 0, s, 1)), -127, 127) for d, s in zip(differences, scales, strict=True)]
    return {
        "scales": np.concatenate([scale.ravel() for scale in scales]),
        "values": np.concatenate([value.ravel() for value in values]).astype(np.int8),
    }


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor's scales: one for each row along its smaller dimension, or one for a vector."""
    smaller = int(np.argmin(shape)) if len(shape) > 1 else -1
    return tuple(count if axis == smaller else 1 for axis, count in enumerate(shape))


def scale_of(difference: np.ndarray) -> np.ndarray:
    """The largest entry of each row, over 127."""
    axes = tuple(axis for axis, count in enumerate(scale_shape(difference.shape)) if count == 1)
    largest: np.ndarray = np.abs(difference).max(axis=axes, keepdims=True) / 127
    return largest.astype(np.float32)


def decode(arrays: Mapping[str, np.ndarray], known: Adapter, form: str) -> Adapter:
    """The adapter that `encode` was given, as far as `form` kept it.

    Raises:
        ValueError: if `arrays` are not what `encode` makes for an adapter like `known`.
    """
    if form == "fp32":
        return dict(arrays)
    kinds: dict[str, dict[str, type]] = {
        "fp16": {"values": np.float16},
        "int8": {"scales": np.float32, "values": np.int8},
    }
    wanted = kinds[form]
    sizes = {"values": sum(value.size for value in known.values())}
    sizes["scales"] = sum(prod(scale_shape(value.shape)) for value in known.values())
    for name, kind in wanted.items():
        if name not in arrays or set(arrays) != set(wanted):
            raise ValueError(f"holds other arrays than {', '.join(wanted)}")
        if arrays[name].dtype != kind or arrays[name].shape != (sizes[name],):
            raise ValueError(
                f"{name} is {arrays[name].dtype} {arrays[name].shape}, not {np.dtype(kind)} ({sizes[name]},)"
            )
    adapter, position, row = {}, 0, 0
    for name, value in sorted(known.items()):
        difference = arrays["values"][position : position + value.size].reshape(value.shape).astype(np.float32)
        position += value.size
        if form == "int8":
            shape = scale_shape(value.shape)
            difference *= arrays["scales"][row : row + prod(shape)].reshape(shape)
            row += prod(shape)
        adapter[name] = value + difference
    return adapter


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Arrays as a Flower record, sorted by name: some strategies align them by position."""
    return ArrayRecord({name: Array(arrays[name]) for name in sorted(arrays)})
