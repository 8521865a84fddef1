"""One run on Flower's Ray-backed simulation engine: check, start, wait, clean up."""

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

import plan
from client import Site, client_app
from config import RunConfig
from progress import RunProgress
from strategy import Federation, RunError
from utils import bytes_text, quiet_libraries, seconds_text

TOKEN_CACHE = ".tokens"


def run(config: RunConfig, folder: Path) -> float:
    """Check that the run can work, run it, say where the results are; returns the final training loss.

    Raises:
        SettingsError: before anything is started, if it can not work.
        RunError: if a round fails.
    """
    console = Console(highlight=False)
    quiet_libraries()
    plan.check_machine(config)
    plan.check_names(config)
    plan.check_folder(folder)
    template = plan.check_inputs(config)
    with RunProgress(config.num_rounds, console) as progress:
        summary = simulate(config, folder, template, progress)
    console.print(
        f"final loss {summary['final_train_loss']:.4f} after {summary['rounds']} rounds "
        f"in {seconds_text(summary['seconds'])}, {bytes_text(summary['bytes_down'] + summary['bytes_up'])} transferred"
    )
    console.print(f"results: {folder}", soft_wrap=True)
    return float(summary["final_train_loss"])


def simulate(config: RunConfig, folder: Path, template: str, progress: RunProgress) -> dict[str, Any]:
    """Run the federation on the engine. The only place that knows `run_simulation`, which returns nothing."""
    from flwr.simulation import run_simulation

    stop, results, failures = threading.Event(), [], []
    server = ServerApp()

    @server.main()
    def _serve(grid: Grid, _: Context) -> None:
        try:
            results.append(Federation(config, folder, template, progress, stop).run(grid))
        except Exception as error:
            failures.append(error)

    cache = folder / TOKEN_CACHE
    site = Site(config, False, cache, folder / "main.log")
    try:
        run_simulation(server, client_app(site), config.num_clients, backend_config=engine_settings(config))
    except Exception as error:
        failures.append(error)
    finally:
        stop.set()
        shutil.rmtree(cache, ignore_errors=True)
    if failures:
        logging.getLogger(__name__).error("the run failed", exc_info=failures[0])
        raise failures[0] if isinstance(failures[0], RunError) else RunError(str(failures[0])) from failures[0]
    return results[0]


def engine_settings(config: RunConfig) -> Any:
    """Flower's backend configuration: the workers' resources, and Ray kept quiet."""
    init: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if config.ray.address:
        init["address"] = config.ray.address
    resources = config.client_resources
    return {
        "init_args": init,
        "client_resources": {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus},
    }


def show_plan(config: RunConfig, folder: Path) -> float:
    """Print what the run would do and take; checks all that needs neither a model nor the network. Returns 0."""
    quiet_libraries()
    plan.check_names(config)
    plan.print_plan(plan.plan(config, folder), print)
    return 0.0
