"""python -m benchmarks.start_up [--repeat=5]: seconds from the command to the end of a first round of one step.

Runs `python main.py experiment=quickstart` with that round alone, without evaluations, and waits for its line.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

from utils import SUITE_FOLDER


def first_step_s(folder: str) -> float:
    """Seconds until a new process has done a round of one step and said so."""
    one_step = ["num_rounds=1", "train.training_arguments.max_steps=1", "dataset.eval_name=null", "dataset.holdout=0"]
    command = [sys.executable, "main.py", "experiment=quickstart", *one_step, f"hydra.run.dir={folder}"]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=SUITE_FOLDER, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seconds = next(time.perf_counter() - start for line in process.stdout if line.startswith("round 1/1"))
    process.communicate()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    times = []
    for _ in range(parser.parse_args().repeat):
        with tempfile.TemporaryDirectory() as folder:
            times.append(first_step_s(folder))
    print(f"first optimizer step after {statistics.median(times):.1f} s (median; {min(times):.1f}-{max(times):.1f} s)")


if __name__ == "__main__":
    main()
