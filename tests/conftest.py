"""What surrounds every test. Imports nothing heavy: pytest-xdist's own process, which runs no test, reads it too."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest

from machine import gpus
from utils import quick_imports


def pytest_collection(session: pytest.Session) -> None:
    """Import what most tests need, where tests are run."""
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses"):
        with quick_imports():
            import tests.federation  # noqa: F401


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A run on a borrowed machine may be cut off: what failed there is told at once."""
    if report.failed and os.environ.get("TELL_AT_ONCE"):
        print(f"\n{report.longreprtext}", file=sys.__stdout__, flush=True)


@pytest.fixture(autouse=True)
def same_gpus_for_every_test() -> Iterator[None]:
    """What runs in this process may hide GPUs from the processes that later tests start."""
    before = os.environ.get(gpus.VARIABLE)
    yield
    os.environ.pop(gpus.VARIABLE, None)
    if before is not None:
        os.environ[gpus.VARIABLE] = before


@pytest.fixture
def pictures() -> None:
    """For tests that look at a run's picture: it is drawn."""


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run draws its losses for every checkpoint, which takes longer than a small round."""
    from runs import card, record

    for module in (card, record) if "pictures" not in request.fixturenames else ():
        monkeypatch.setattr(module, "plot_loss", lambda metrics, path, title: path.write_bytes(b""))


def pytest_collection_finish() -> None:
    """Every trainer collects garbage: let it not look through all that was imported."""
    gc.collect()
    gc.freeze()
