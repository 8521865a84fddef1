"""A run's rounds over any Grid: what a simulation and a deployment have in common."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from rich.console import Console

from dataset import alarm
from runs.progress import RunProgress, start_tracker, summary_line
from server.federation import Federation
from server.plan import Inputs
from settings.schema import RunConfig

log = logging.getLogger(__name__)


def play(grid: Grid, config: RunConfig, folder: Path, inputs: Inputs, *, resumes: bool) -> dict[str, Any]:
    """Play the rounds that are left in the run folder, which is claimed for this process, and show them.

    Returns what results.json holds; raises as `Federation.run` and `Federation.restore`.
    """
    console = Console(highlight=False)
    with ExitStack() as stack:
        if tracker := start_tracker(config, folder):
            stack.callback(tracker.finish)
        progress = stack.enter_context(RunProgress(config.num_rounds, console, tracker))
        for found in inputs.surveys:
            log.info("%s: %s", found.rows.name, found)
            console.out(str(found))
            if found.is_mostly_left_out:
                console.print(alarm(found))
        for warning in inputs.warnings:
            log.warning("%s", warning)
            progress.warn(warning)
        federation = Federation(config, folder, inputs.template, progress)
        try:
            if resumes:
                federation.restore()
            summary = federation.run(grid, inputs.for_results)
        except BaseException as error:
            log.error("the run ended early: %r", error, exc_info=isinstance(error, Exception))
            raise
    console.out(summary_line(summary))
    console.out(f"results: {folder}")
    return summary
