"""One simulated run: check, start the workers, play the rounds, clean up."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import model
from client import Site
from runs import runfolder
from server import plan
from server.backend import simulated_grid
from server.play import play
from settings.schema import RunConfig
from utils import local_path, objective, quiet_libraries

TOKEN_CACHE = ".tokens"


def simulate(config: RunConfig, folder: Path, overrides: Sequence[str] = ()) -> float:
    """Check that the run can work, run it, say where the results are; returns what a sweeper minimises.

    A run that was interrupted in `folder` is resumed, if `resume` or `resume_sweep` says so.

    Raises:
        SettingsError: before the first round, if it cannot work.
        RunError: if a round fails.
    """
    quiet_libraries()
    plan.check_names(config)
    with runfolder.claimed(folder, config, overrides) as resumes, token_cache(folder) as cache:
        checked = None if local_path(config.model.name) else plan.check_inputs(config)  # before weights are downloaded
        model.base_folder(config.model, weights=not config.ray.address)  # a cluster's machines download it themselves
        with simulated_grid(Site(config, False, cache, folder / "main.log")) as grid:
            inputs = checked or plan.check_inputs(config)  # while the workers load the base model
            runfolder.check_data(folder, inputs.data)
            return objective(play(grid, config, folder, inputs, resumes=resumes))


@contextmanager
def token_cache(folder: Path) -> Iterator[Path]:
    """A folder in which the workers share tokenized partitions, new and for this run only."""
    cache = folder / TOKEN_CACHE
    shutil.rmtree(cache, ignore_errors=True)  # of a process that was killed
    try:
        yield cache
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def show_plan(config: RunConfig, folder: Path) -> float:
    """Print what the run would do and take; checks all that needs neither a model nor the network. Returns 0."""
    quiet_libraries()
    plan.check_names(config)
    plan.print_plan(plan.plan(config, folder), print)
    return 0.0
