"""python main.py [KEY=VALUE ...]: federated fine-tuning, simulated on this machine or on a Ray cluster.

Composes the settings, checks them, runs the simulation and says where the results are. Exit codes: 0
the run is complete, 1 it failed, 2 a setting has to be changed; 130, 143 or 129: Ctrl-C, SIGTERM or
SIGHUP stopped it.
"""

import logging
import math
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from machine import gpus
from runs import runfolder, stopping
from runs.compare import SweepReport
from runs.reading import COMPLETE, read_run
from runs.terminal import keep_output
from server import engine
from settings.compose import checked, one_line
from settings.overrides import canonical
from settings.resume import resumed_sweep
from settings.schema import CONFIG_FOLDER, SettingsError
from utils import leave_unusable_home, objective, quick_imports, send_nothing_home

exit_codes: list[int] = []  # of the jobs of this command line


@hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="config")
def job(cfg: DictConfig) -> float:
    """One run, or one job of a sweep; returns what a sweeper minimises."""
    folder, overrides = Path(HydraConfig.get().runtime.output_dir), list(HydraConfig.get().overrides.task)
    os.chdir(HydraConfig.get().runtime.cwd)  # whatever hydra.job.chdir says: paths are as seen from where it is typed
    try:
        config = checked(cfg, overrides, folder)
        resumes = not config.dry_run and (config.resume or config.resume_sweep)
        done = read_run(folder) if resumes else None
        if done and done.status == COMPLETE and not runfolder.has_more_room(folder, config, done.results):
            runfolder.check_same(folder, config)
            ended = done.results.get("ended")
            print(f"{folder}: already complete, final loss {done.results['final_train_loss']:.4f}")
            if ended:
                print(f"it was ended early by {ended}; resume it with a larger value")
            return objective(done.results)
        gpus.show([])  # this process computes nothing: its workers alone see GPUs
        if not config.dry_run:
            engine.check_machine(config)
            engine.begin(config)
        with quick_imports():  # of the model libraries, which take seconds: settings are checked first
            from server.backend import simulate
            from server.plan import show_plan

        return show_plan(config, folder) if config.dry_run else simulate(config, folder, overrides)
    except KeyboardInterrupt as stopped:
        rounds = runfolder.rounds_in(folder)
        where = f"after round {rounds[0]}" if rounds else "before a round was complete"
        stopped.add_note(where + how_to_resume(folder))
        raise
    except Exception as error:
        exit_codes.append(report(error))
        if not runfolder.has_rounds(folder):  # else the error of a run is there already, and any other is none of a run
            with suppress(OSError):
                (folder / runfolder.ERROR_FILE).write_text(f"{error or repr(error)}\n", encoding="utf-8")
        elif exit_codes[-1] == 1 and not in_sweep() and (hint := how_to_resume(folder)):
            print(hint, file=sys.stderr)
        return math.inf


def how_to_resume(folder: Path) -> str:
    """A line with the command that resumes this run, or its sweep; empty if there is nothing to resume."""
    command = runfolder.command_to_resume(folder, Path(HydraConfig.get().sweep.dir) if in_sweep() else None)
    return f"\nto resume: {command}" if command else ""


def in_sweep() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def report(error: Exception) -> int:
    """Print what went wrong, one line for a wrong setting; returns the exit code."""
    if isinstance(error, SettingsError | OmegaConfBaseException | HydraException):
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if not isinstance(error, RuntimeError):  # a fault of the suite
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return 1


def main() -> int:
    """Run the command line."""
    keep_output()
    send_nothing_home()
    leave_unusable_home()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here instead of into Hydra's own report
    logging.raiseExceptions = False  # a log that cannot be written must not bury the reason
    try:
        stopping.listen()
        sys.argv[1:] = resumed_sweep(canonical(sys.argv[1:]))
        job()
    except KeyboardInterrupt as stopped:
        print("stopped", *getattr(stopped, "__notes__", ()), file=sys.stderr)
        return getattr(stopped, "exit_code", 130)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        return report(SettingsError(one_line(error)))
    except OSError as error:
        return report(SettingsError(f"{error.filename}: {error.strerror}; choose another folder (hydra.run.dir)"))
    finally:
        with suppress(KeyboardInterrupt):  # a signal that comes now changes nothing
            engine.end()
    if SweepReport.failed:
        return 1
    return max(exit_codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
