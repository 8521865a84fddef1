"""One simulated run: check, start the workers, play the rounds, clean up."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

import model
from client import Site
from runs import runfolder
from runs.progress import RunProgress, summary_line
from runs.tracking import start_tracker
from server import plan
from server.engine import worker_grid
from server.federation import Federation
from settings.schema import RunConfig
from utils import local_path, objective, quiet_libraries

TOKEN_CACHE = ".tokens"


def run(config: RunConfig, folder: Path, overrides: Sequence[str] = ()) -> float:
    """Check that the run can work, run it, say where the results are; returns what a sweeper minimises.

    A run that was interrupted in `folder` is resumed, if `resume` or `resume_sweep` says so.

    Raises:
        SettingsError: before the first round, if it cannot work.
        RunError: if a round fails.
    """
    console = Console(highlight=False)
    quiet_libraries()
    plan.check_names(config)
    cache = folder / TOKEN_CACHE
    with ExitStack() as stack:
        resumes = stack.enter_context(runfolder.claimed(folder, config, overrides))
        shutil.rmtree(cache, ignore_errors=True)  # of a process that was killed
        stack.callback(shutil.rmtree, cache, ignore_errors=True)
        tracker = start_tracker(config, folder)
        if tracker:
            stack.callback(tracker.finish)
        checked = None if local_path(config.model.name) else plan.check_inputs(config)  # before weights are downloaded
        model.base_folder(config.model, weights=not config.ray.address)  # a cluster's machines download it themselves
        grid = stack.enter_context(worker_grid(Site(config, False, cache, folder / "main.log")))
        template, data = checked or plan.check_inputs(config)  # while the workers load the base model
        runfolder.check_data(folder, data)
        progress = stack.enter_context(RunProgress(config.num_rounds, console, tracker))
        if shared := data.get("held_out", {}).get("also_trained_on", 0):
            message = f"dataset.eval_name: {shared} of its rows are trained on too: they are in dataset.name as well"
            logging.getLogger(__name__).warning(message)
            progress.warn(message)
        federation = Federation(config, folder, template, progress)
        federation.facts["held_out_rows_trained_on"] = shared
        try:
            if resumes:
                federation.restore()
            summary = federation.run(grid)
        except KeyboardInterrupt as stopped:
            logging.getLogger(__name__).info("stopped: %s", stopped)
            raise
        except Exception as error:
            logging.getLogger(__name__).error("the run failed", exc_info=error)
            raise
    console.print(summary_line(summary), soft_wrap=True)
    console.print(f"results: {folder}", soft_wrap=True)
    return objective(summary)


def show_plan(config: RunConfig, folder: Path) -> float:
    """Print what the run would do and take; checks all that needs neither a model nor the network. Returns 0."""
    quiet_libraries()
    plan.check_names(config)
    plan.print_plan(plan.plan(config, folder), print)
    return 0.0
