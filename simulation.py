"""One simulated run: check, start the workers, play the rounds, clean up."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

import plan
from client import Site
from compare import SETTINGS_FILE
from config import RunConfig
from engine import worker_grid
from progress import RunProgress, summary_line
from strategy import Federation
from tracking import start_tracker
from utils import quiet_libraries, write_json

TOKEN_CACHE = ".tokens"


def run(config: RunConfig, folder: Path, overrides: Sequence[str] = ()) -> float:
    """Check that the run can work, run it, say where the results are; returns the final training loss.

    Raises:
        SettingsError: before the first round, if it can not work.
        RunError: if a round fails.
    """
    console = Console(highlight=False)
    quiet_libraries()
    plan.check_names(config)
    plan.check_folder(folder, fresh=config.resume_sweep is not None)
    write_json(folder / SETTINGS_FILE, {"overrides": list(overrides), "settings": asdict(config)})
    cache = folder / TOKEN_CACHE
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, cache, ignore_errors=True)
        tracker = start_tracker(config, folder)
        if tracker:
            stack.callback(tracker.finish)
        grid = stack.enter_context(worker_grid(Site(config, False, cache, folder / "main.log")))
        template = plan.check_inputs(config)  # while the workers load the base model
        progress = stack.enter_context(RunProgress(config.num_rounds, console, tracker))
        try:
            summary = Federation(config, folder, template, progress).run(grid)
        except Exception as error:
            logging.getLogger(__name__).error("the run failed", exc_info=error)
            raise
    console.print(summary_line(summary), soft_wrap=True)
    console.print(f"results: {folder}", soft_wrap=True)
    return float(summary["final_train_loss"])


def show_plan(config: RunConfig, folder: Path) -> float:
    """Print what the run would do and take; checks all that needs neither a model nor the network. Returns 0."""
    quiet_libraries()
    plan.check_names(config)
    plan.print_plan(plan.plan(config, folder), print)
    return 0.0
