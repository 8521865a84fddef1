"""python -m benchmarks.scale [--clients 20 200 2000 10000] [--rounds=9]

Two clients of many take part in each round. Prints, for every number of clients: seconds until the first round,
median seconds of a round, and the driver's and the workers' peak memory. Each number has a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from utils import SUITE_FOLDER, bytes_text, read_json_lines


def write_rows(path: Path, count: int) -> None:
    """`count` different short rows."""
    rows = ({"instruction": f"Say {n}.", "input": "", "output": f"The number is {n}."} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(clients: int, rounds: int, folder: Path, rows: Path) -> dict[str, float]:
    """One simulated run with `clients` clients."""
    run = folder / str(clients)
    command = [sys.executable, "main.py", "experiment=quickstart", f"num_clients={clients}", f"num_rounds={rounds}"]
    command += [f"strategy.fraction_fit={2 / clients}", f"dataset.name={rows}", f"hydra.run.dir={run}"]
    done = subprocess.run(command, cwd=SUITE_FOLDER, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    metrics, results = read_json_lines(run / "metrics.jsonl"), json.loads((run / "results.json").read_text())
    walls = [line["seconds"]["wall"] for line in metrics]
    return {
        "round_s": statistics.median(walls[1:]),
        "start_s": results["seconds"] - sum(walls),
        "server_bytes": results["server_peak_memory_bytes"],
        "worker_bytes": results["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 200, 2000, 10000])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{'clients':>8}{'start':>9}{'round':>9}{'driver':>11}{'worker':>11}")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, 2 * max(options.clients))
        for clients in options.clients:
            facts = measure(clients, options.rounds, Path(folder), rows)
            memory = bytes_text(facts["server_bytes"]), bytes_text(facts["worker_bytes"])
            print(f"{clients:>8}{facts['start_s']:>7.1f} s{facts['round_s']:>7.2f} s{memory[0]:>11}{memory[1]:>11}")


if __name__ == "__main__":
    main()
