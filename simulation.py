"""One simulated run: check, start the workers, play the rounds, clean up."""

import logging
import shutil
from pathlib import Path

from rich.console import Console

import plan
from client import Site
from config import RunConfig, SettingsError
from engine import worker_grid
from progress import RunProgress, summary_line
from strategy import Federation, RunError
from tracking import start_tracker
from utils import quiet_libraries

TOKEN_CACHE = ".tokens"


def run(config: RunConfig, folder: Path) -> float:
    """Check that the run can work, run it, say where the results are; returns the final training loss.

    Raises:
        SettingsError: before the first round, if it can not work.
        RunError: if a round fails.
    """
    console = Console(highlight=False)
    quiet_libraries()
    plan.check_names(config)
    plan.check_folder(folder, fresh=config.resume_sweep is not None)
    tracker = start_tracker(config, folder)
    cache = folder / TOKEN_CACHE
    try:
        with worker_grid(Site(config, False, cache, folder / "main.log")) as grid:  # they load while this checks
            template = plan.check_inputs(config)
            with RunProgress(config.num_rounds, console, tracker) as progress:
                summary = Federation(config, folder, template, progress).run(grid)
    except SettingsError:
        raise
    except Exception as error:
        logging.getLogger(__name__).error("the run failed", exc_info=error)
        raise error if isinstance(error, RunError) else RunError(str(error)) from error
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    console.print(summary_line(summary), soft_wrap=True)
    console.print(f"results: {folder}", soft_wrap=True)
    return float(summary["final_train_loss"])


def show_plan(config: RunConfig, folder: Path) -> float:
    """Print what the run would do and take; checks all that needs neither a model nor the network. Returns 0."""
    quiet_libraries()
    plan.check_names(config)
    plan.print_plan(plan.plan(config, folder), print)
    return 0.0
