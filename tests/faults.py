"""Faults that happen inside of Ray's worker processes, which import this module by its name."""

import functools
from pathlib import Path

import client
from machine import faults
from server import backend, worker


def breaks_once(monkeypatch, folder: Path, device: str) -> None:
    """Let the first worker of a simulation meet a GPU's assert when it is first asked; later ones are well."""
    monkeypatch.setattr(backend, "set_up", functools.partial(set_up_to_break, folder / "broken", device))


def set_up_to_break(marker: Path, device: str, site: client.Site) -> None:
    worker.set_up(site)
    if not marker.exists():
        marker.touch()
        client.HANDLERS["describe"] = functools.partial(meet_assert, device)


def meet_assert(device: str, *_):
    import torch

    if device == "cpu":  # as it looks from outside
        client.is_unusable = lambda: True
        raise RuntimeError("device-side assert triggered. CUDA kernel errors might be asynchronously reported")
    assert not faults.is_unusable()
    torch.zeros(4, device=device)[torch.tensor([9], device=device)].cpu()
