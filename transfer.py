"""How an adapter travels: whole, in float32; or as its difference from what the other side has, in less.

The server sends differences from the initial adapter, which every client can make itself; a client answers with
the difference from what it received. Only differences are ever rounded, and the server adds them to its own
exact adapter, so errors do not pile up. Whatever arrives is decoded to float32 before it is checked.
"""

from collections.abc import Mapping

import numpy as np

from model import Adapter

Shapes = Mapping[str, tuple[int, ...]]


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
    values = [np.rint(d / np.where(s > 0, s, 1)) for d, s in zip(differences, scales, strict=True)]
    return {
        "scales": np.concatenate([scale.ravel() for scale in scales]),
        "values": np.concatenate([value.ravel() for value in values]).astype(np.int8),
    }


def scale_of(difference: np.ndarray) -> np.ndarray:
    """The largest entry of each row, over 127; rows run along the smaller dimension."""
    axes = tuple(axis for axis in range(difference.ndim) if axis != np.argmin(difference.shape))
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
    sizes["scales"] = sum(min(value.shape, default=1) for value in known.values())
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
            axis = int(np.argmin(value.shape))
            scale = arrays["scales"][row : row + value.shape[axis]]
            row += value.shape[axis]
            difference *= scale.reshape([-1 if each == axis else 1 for each in range(value.ndim)])
        adapter[name] = value + difference
    return adapter
