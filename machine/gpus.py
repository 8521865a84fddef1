"""The GPUs of this machine, and which of them a process sees. Imports nothing heavy.

CUDA reads CUDA_VISIBLE_DEVICES once in a process, when the first library looks, and importing bitsandbytes is a look:
what a process may see is decided before it imports the model libraries, and stays.
"""

import functools
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Card:
    """A GPU as the driver's management library (NVML) tells of it."""

    uuid: str
    name: str
    total_bytes: float
    """Infinite where NVML does not tell it: in a container with a MIG device, or where memory is the machine's own."""
    free_bytes: float


@functools.cache
def given() -> str | None:
    """What CUDA_VISIBLE_DEVICES was before `show` first changed it; None: it was not set."""
    return os.environ.get(VARIABLE)


def show(ids: Sequence[str]) -> None:
    """Let libraries of this process, before they look, and the processes it starts see these GPUs alone."""
    given()
    os.environ[VARIABLE] = ",".join(ids)


def first() -> list[str]:
    """The first GPU that this process was given, if there is one; asks nobody, so it need not exist."""
    name = "0" if (text := given()) is None else text.split(",")[0].strip()
    return [name] if name else []


def ids() -> list[str]:
    """The GPUs that this process was given, each as CUDA_VISIBLE_DEVICES names it: number, UUID, or MIG device.

    As CUDA reads that variable: what comes after a name without a GPU is not seen, and nothing is if one is named
    twice. Blanks are taken out, which CUDA takes for a part of a name.
    """
    found = cards()
    if (text := given()) is None:
        return [str(number) for number in range(len(found))]
    seen: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not card_of(name, found):
            break
        if name in seen:
            return []
        seen.append(name)
    return seen


def card_of(name: str, found: Sequence[Card]) -> Card | None:
    """The card that a name in CUDA_VISIBLE_DEVICES means; a MIG device's is not told apart from the first."""
    if name.isdecimal():
        return found[int(name)] if int(name) < len(found) else None
    if name.startswith("MIG-"):
        return next(iter(found), None)
    return next((card for card in found if name.startswith("GPU-") and card.uuid.startswith(name)), None)


def fullest() -> Card | None:
    """Of the GPUs that this process was given, the one with the least free memory."""
    found = cards()
    seen = [card for name in ids() if (card := card_of(name, found))]
    return min(seen, key=lambda card: card.free_bytes, default=None)


def cards() -> list[Card]:
    """All GPUs of this machine, whatever CUDA_VISIBLE_DEVICES says; none without NVIDIA's driver. CUDA stays asleep."""
    from ray._private.thirdparty import pynvml as nvml  # NVIDIA's own bindings, as Ray ships them

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    found = []
    try:
        for handle in map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount())):
            total, free = math.inf, math.inf
            with suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                total, free = float(memory.total), float(memory.free)
            found.append(Card(nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle), total, free))
    finally:
        nvml.nvmlShutdown()
    return found
