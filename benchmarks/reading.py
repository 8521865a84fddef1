"""python -m benchmarks.reading [--megabytes=1000] [--clients=20]

Makes a file of JSON lines, and prints for this suite and for `datasets.load_dataset`: seconds and microseconds a row
until all rows are read, and peak memory; for this suite also until one client's partition is tokenized. Each in a
process of its own, `load_dataset` with an empty cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from utils import SUITE_FOLDER, bytes_text, peak_resident_bytes

TEXT = "The {} of row {} is told in a sentence that has about as many words as others in such data have. "


def write_rows(path: Path, size: int) -> int:
    """Different rows of about 700 bytes until the file has this `size`; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for _ in range(1000):
                told = {
                    "instruction": TEXT.format("question", count),
                    "input": "",
                    "output": TEXT.format("answer", count) * 5,
                }
                file.write(json.dumps(told) + "\n")
                count += 1
    return count


def read_here(path: str, clients: int) -> dict[str, float]:
    from dataset import load_rows, partition_of, partition_rows, read_template, tokenize_rows
    from model import read_tokenizer
    from settings.compose import compose

    config = compose(["experiment=quickstart", f"dataset.name={path}", f"num_clients={clients}"])
    tokenizer, before, start = read_tokenizer(config.model), peak_resident_bytes(), time.perf_counter()
    rows = load_rows(config.dataset)
    read = time.perf_counter() - start
    own = partition_of(rows, partition_rows(rows, config.dataset, clients, 0), 0)
    tokenize_rows(own, tokenizer, read_template(config.dataset, tokenizer), 512)
    whole = time.perf_counter() - start
    return {"read_s": read, "whole_s": whole, "before": before, "peak": peak_resident_bytes()}


def read_there(path: str, clients: int) -> dict[str, float]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    before, start = peak_resident_bytes(), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        load_dataset("json", data_files=path, split="train", cache_dir=cache)
        return {"read_s": time.perf_counter() - start, "before": before, "peak": peak_resident_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--reader", choices=["here", "there"], help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        print(json.dumps({"here": read_here, "there": read_there}[options.reader](options.file, options.clients)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        count = write_rows(path, options.megabytes * 10**6)
        print(f"{bytes_text(path.stat().st_size)}, {count:,} rows")
        for name in ("here", "there"):
            command = [sys.executable, "-m", "benchmarks.reading", f"--reader={name}", f"--file={path}"]
            done = subprocess.run([*command, f"--clients={options.clients}"], cwd=SUITE_FOLDER, stdout=-1, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            memory = f"memory {bytes_text(found['peak'])} ({bytes_text(found['before'])} before)"
            whole = (
                f", with one of {options.clients} partitions as tokens {found['whole_s']:.1f} s"
                if "whole_s" in found
                else ""
            )
            label = {"here": "this suite", "there": "load_dataset"}[name]
            print(f"{label}: {found['read_s']:.1f} s, {found['read_s'] / count * 1e6:.1f} us a row{whole}, {memory}")


if __name__ == "__main__":
    main()
