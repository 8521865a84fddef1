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
    """Play the rounds that are left, show them, say where the results are; returns what results.json holds.

    Args:
        folder: the run folder, claimed for this process.
        resumes: whether a run that was interrupted there is resumed.

    Raises:
        SettingsError, RunError: as `Federation.run` and `Federation.restore`.
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
        federation = Federation(config, folder, inputs.template, progress, inputs.for_results)
        try:
            if resumes:
                federation.restore()
            summary = federation.run(grid)
        except KeyboardInterrupt as stopped:
            log.info("stopped: %s", stopped)
            raise
        except Exception as error:
            log.error("the run failed", exc_info=error)
            raise
    console.out(summary_line(summary))
    console.out(f"results: {folder}")
    return summary
