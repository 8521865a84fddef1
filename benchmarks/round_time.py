"""python -m benchmarks.round_time [--model=FOLDER] [--dataset=FILE] [--quantization=4] [--pairs=5] [--output=FILE.json]

One client-round (10 steps of 16 rows) three ways, alternating, on one machine:
  limit  a plain PyTorch loop over the same rows in micro-batches sorted by length, model and tokens at hand
  suite  this suite's client-round: adapter in, rows, training, adapter out
  naive  as well-known examples do it: for every client and round the model is loaded and quantized (fp4,
         float32 compute), prepared with float32 norms and embeddings, the rows are tokenized, and batches
         of 16 random rows are padded to the longest
By default on a LLaMA of 7 million random weights and the docstrings of Python's library, so it needs nothing.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import model as adapters
from benchmarks import workload
from client import Worker, fine_tune
from dataset import fresh_rows
from learning.training import Task, by_length, collate
from settings.compose import compose
from settings.schema import RunConfig
from utils import bytes_text, peak_resident_bytes, quiet_libraries

CLIENTS = 20
RATE = 5e-5


def settings(options: argparse.Namespace, folder: Path) -> RunConfig:
    name = options.model or workload.write_model(folder / "model", options.shape)
    rows = options.dataset or workload.write_rows(folder / "rows.jsonl")
    return compose(
        [
            f"model.name={name}",
            f"dataset.name={rows}",
            f"model.quantization={options.quantization}",
            f"num_clients={CLIENTS}",
            f"client_resources.num_cpus={torch.get_num_threads()}",
            "client_resources.num_gpus=0",
            "train.training_arguments.gradient_checkpointing=false",
            *options.overrides,
        ]
    )


class Limit:
    """The plain loop: everything that can be done beforehand is."""

    def __init__(self, config: RunConfig, worker: Worker) -> None:
        self.config, self.worker = config, worker
        self.model = adapters.add_adapter(adapters.load_base(config.model), config.model)
        self.model.train()

    def round(self, number: int, client: int) -> dict[str, int]:
        config, arguments = self.config, self.config.train.training_arguments
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], RATE, weight_decay=0.0)
        count = config.batch_size * arguments["max_steps"]
        chosen = fresh_rows(self.worker.split(client)[0], 0, count, config.seed, client)
        partition = self.worker.partition(client)
        rows = by_length([partition.row(index) for index in chosen], config.batch_size)
        padded = 0
        for start in range(0, len(rows), config.batch_size):
            step = rows[start : start + config.batch_size]
            labelled = sum(label != -100 for row in step for label in row["labels"][1:])
            for first in range(0, len(step), config.train.micro_batch_size):
                batch = collate(step[first : first + config.train.micro_batch_size])
                padded += batch["input_ids"].numel()
                logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
                )
                (loss / labelled).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return {"tokens": sum(len(row["input_ids"]) for row in rows), "padded": padded}


class Suite:
    """One client-round of this suite."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.adapter = adapters.get_adapter(worker.model)

    def round(self, number: int, client: int) -> dict[str, int]:
        self.adapter, report = fine_tune(self.worker, self.adapter, client, Task(number + 1, RATE))
        return {"tokens": int(report["tokens"]), "padded": int(report["padded_tokens"])}


class Naive:
    """Load, quantize, prepare, tokenize and pad again, for every client and round."""

    def __init__(self, config: RunConfig, worker: Worker) -> None:
        self.config, self.worker = config, worker
        self.padded = self.tokens = 0

    def round(self, number: int, client: int) -> dict[str, int]:
        config, arguments = self.config, self.config.train.training_arguments
        tokenizer = AutoTokenizer.from_pretrained(config.model.name)
        tokenizer.pad_token = tokenizer.eos_token
        quantization = {"4": BitsAndBytesConfig(load_in_4bit=True), "8": BitsAndBytesConfig(load_in_8bit=True)}
        model = AutoModelForCausalLM.from_pretrained(
            config.model.name, quantization_config=quantization.get(config.model.quantization), dtype=torch.bfloat16
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config.model.lora))
        self.padded = self.tokens = 0
        with tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                model=model,
                processing_class=tokenizer,
                data_collator=lambda rows: self.collate(rows, tokenizer.pad_token_id),
                args=SFTConfig(
                    output_dir=folder, per_device_train_batch_size=config.batch_size, max_steps=arguments["max_steps"],
                    max_length=config.train.seq_length, gradient_checkpointing=True, report_to="none", use_cpu=True,
                    save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=False, learning_rate=RATE,
                    dataloader_pin_memory=False,
                ),
                train_dataset=self.worker.raw_rows(client).map(
                    lambda row: {
                        "prompt": f"### Instruction:\n{row['instruction']}\n{row['input']}\n### Response:\n",
                        "completion": row["output"],
                    },
                    remove_columns=["instruction", "input", "output"],
                    load_from_cache_file=False,
                ),
            )  # fmt: skip
            trainer.train()
        return {"tokens": self.tokens, "padded": self.padded}

    def collate(self, rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
        """A batch padded to its longest row, with an attention mask."""
        longest = max(len(row["input_ids"]) for row in rows)
        self.padded += longest * len(rows)
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            ids, missing = row["input_ids"], longest - len(row["input_ids"])
            mask = row.get("completion_mask") or [1] * len(ids)
            batch["input_ids"].append(ids + [pad] * missing)
            batch["attention_mask"].append([1] * len(ids) + [0] * missing)
            batch["labels"].append([i if m else -100 for i, m in zip(ids, mask, strict=True)] + [-100] * missing)
        return {name: torch.tensor(values) for name, values in batch.items()}


def timed(play: Callable[[int, int], dict[str, int]], number: int, client: int) -> dict[str, float]:
    start = time.perf_counter()
    counts = play(number, client)
    return {"seconds": time.perf_counter() - start, **counts}


def measure(config: RunConfig, pairs: int, naive_rounds: int) -> dict[str, list[dict[str, float]]]:
    """`pairs` alternating client-rounds of each kind, in both orders, each pair on a client of its own.

    Before, one round of each warms up, and the tokens of all clients are made: the suite does that once a run.
    """
    worker = Worker(config)
    contenders = {"limit": Limit(config, worker), "suite": Suite(worker), "naive": Naive(config, worker)}
    for client in range(min(CLIENTS, pairs + 1)):
        worker.partition(client)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(pairs + 1):
        for name in sorted(contenders, reverse=number % 2 == 0):
            if name == "naive" and number > naive_rounds:
                continue
            result = timed(contenders[name].round, number, number % CLIENTS)
            if number:
                times[name].append(result)
                print(f"pair {number}  {name:<6} {result['seconds']:6.2f} s", file=sys.stderr)
    return times


def summarize(times: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, results in times.items():
        if not results:
            continue
        seconds = [result["seconds"] for result in results]
        rows[name] = {
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "tokens": int(np.mean([result["tokens"] for result in results])),
            "padded_tokens": int(np.mean([result["padded"] for result in results])),
        }

    for first, second in (("suite", "limit"), ("naive", "suite")):
        # of a pair: both ran at about the same time, on rows of the same client
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(times[first], times[second], strict=False)]
        rows[f"{first}/{second}"] = statistics.median(ratios) if ratios else None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="local model folder; default: 7M random weights")
    parser.add_argument("--shape", choices=workload.SHAPES, default="7M", help="of the random weights")
    parser.add_argument("--dataset", type=Path, help="local file with instruction, input, output")
    parser.add_argument("--quantization", choices=["4", "8", "none"], default="4")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--naive-rounds", type=int, default=5, help="naive takes long: run it in the first pairs only")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument("overrides", nargs="*", help="settings, as for main.py")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(options, Path(folder))
        results = summarize(measure(config, options.pairs, options.naive_rounds))
    results["peak_memory_bytes"] = peak_resident_bytes()
    results["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"\none client-round: {config.train.training_arguments['max_steps']} steps of {config.batch_size} rows, "
          f"quantization {config.model.quantization}, {results['machine']}")  # fmt: skip
    print(f"{'':<8}{'median':>9}{'spread':>18}{'tokens':>9}{'with padding':>14}")
    for name in ("limit", "suite", "naive"):
        if name not in results:
            continue
        row = results[name]
        spread = f"{row['min_s']:.2f}-{row['max_s']:.2f} s"
        print(f"{name:<8}{row['median_s']:>7.2f} s{spread:>18}{row['tokens']:>9}{row['padded_tokens']:>14}")
    ratios = [f"{name} {results[name]:.3f}" for name in ("suite/limit", "naive/suite") if results[name]]
    print("   ".join([*ratios, f"peak memory of all together {bytes_text(results['peak_memory_bytes'])}"]))
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
