"""python main.py [KEY=VALUE ...]: federated fine-tuning, simulated on this machine or on a Ray cluster.

Composes the settings, checks them, runs the simulation and says where the results are. Exit codes: 0
the run is complete, 1 it failed, 2 a setting has to be changed.
"""

import math
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from config import SettingsError, canonical, checked, one_line

exit_codes: list[int] = []  # of the jobs of this command line


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg: DictConfig) -> float:
    """One run, or one job of a sweep; returns the final training loss, for sweepers."""
    try:
        config, folder = checked(cfg), Path(HydraConfig.get().runtime.output_dir)
        import simulation  # the model libraries take seconds: settings are checked first

        return simulation.show_plan(config, folder) if config.dry_run else simulation.run(config, folder)
    except (SettingsError, OmegaConfBaseException, RuntimeError) as error:
        exit_codes.append(report(error))
        return math.nan


def report(error: Exception) -> int:
    """Print an expected failure, one line for a wrong setting; returns the exit code."""
    failed = isinstance(error, RuntimeError)
    print(f"error: {error if failed else one_line(error)}", file=sys.stderr)
    return 1 if failed else 2


def main() -> int:
    """Run the command line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here instead of into Hydra's own report
    sys.argv[1:] = canonical(sys.argv[1:])
    try:
        job()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return report(error)
    except OSError as error:
        return report(SettingsError(f"{error.filename}: {error.strerror}; choose another folder (hydra.run.dir)"))
    return max(exit_codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
