"""python -m benchmarks.round_time [--shape=7M] [--vocab=32000] [--model=FOLDER] [--dataset=FILE] [--quantization=4]

One client-round (10 steps of 16 rows) four ways, alternating, on one machine:
  limit  the best plain PyTorch loop: the same rows in micro-batches sorted by length, the head on labelled positions
         alone, model and tokens at hand
  suite  this suite's client-round in this process, with its default settings: adapter in, rows, training, adapter out
  main   the same through `python main.py`: the second round of a run of one client a round, engine included
  naive  as well-known examples do it: for every client and round the model is loaded and quantized (fp4,
         float32 compute), prepared with float32 norms and embeddings, the rows are tokenized, and batches
         of 16 random rows are padded to the longest
and 200 held-out rows two ways:
  plain  a plain forward loop over labelled positions
  scored the suite's evaluation
By default on a LLaMA of 7 million random weights and the docstrings of Python's library, so it needs nothing.
"""

import argparse
import platform
import statistics
import subprocess
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
from dataset import IGNORED, fresh_rows
from learning.evaluation import in_batches, losses_on
from learning.training import Task, by_length, collate
from settings.compose import compose
from settings.schema import RunConfig
from utils import SUITE_FOLDER, bytes_text, peak_resident_bytes, quiet_libraries, read_json_lines, write_json

CLIENTS = 20
RATE = 5e-5
HELD_OUT = 200  # rows that are evaluated
RATIOS = (("suite", "limit"), ("main", "limit"), ("naive", "suite"), ("naive", "main"), ("scored", "plain"))


def settings(options: argparse.Namespace, folder: Path) -> list[str]:
    """Overrides of the defaults, as for main.py."""
    name = options.model or workload.write_model(folder / "model", options.shape, options.vocab)
    rows = options.dataset or workload.write_rows(folder / "rows.jsonl")
    return [
        f"model.name={name}",
        f"dataset.name={rows}",
        f"model.quantization={options.quantization}",
        f"num_clients={CLIENTS}",
        f"client_resources.num_cpus={torch.get_num_threads()}",
        "client_resources.num_gpus=0",
        *options.overrides,
    ]


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
            labelled = sum(label != IGNORED for row in step for label in row["labels"][1:])
            for first in range(0, len(step), config.train.micro_batch_size):
                batch = collate(step[first : first + config.train.micro_batch_size])
                padded += batch["input_ids"].numel()
                logits, labels = labelled_logits(self.model, batch)
                loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                (loss / labelled).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return {"tokens": sum(len(row["input_ids"]) for row in rows), "padded": padded}


def labelled_logits(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, vocabulary) logits before the N labels of a batch, and those labels."""
    base = model.get_base_model()
    states = base.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    return base.get_output_embeddings()(states[labels != IGNORED]), labels[labels != IGNORED]


class Suite:
    """One client-round of this suite."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.adapter = adapters.get_adapter(worker.model)

    def round(self, number: int, client: int) -> dict[str, int]:
        self.adapter, report = fine_tune(self.worker, self.adapter, client, Task(number + 1, RATE))
        return {"tokens": int(report["tokens"]), "padded": int(report["padded_tokens"])}


class Main:
    """One client-round through the command, in processes of its own."""

    def __init__(self, config: RunConfig, overrides: list[str]) -> None:
        self.config, self.overrides = config, overrides

    def round(self, number: int, client: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "main.py", *self.overrides, "num_rounds=2", f"seed={number}"]
            command += [f"strategy.fraction_fit={1 / CLIENTS}", f"hydra.run.dir={folder}/run"]
            done = subprocess.run(command, cwd=SUITE_FOLDER, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            line = read_json_lines(Path(folder) / "run" / "metrics.jsonl")[-1]
        return {"tokens": line["tokens"], "padded": line["padded_tokens"], "seconds": line["seconds"]["wall"]}


class Naive:
    """Load, quantize, prepare, tokenize and pad again, for every client and round."""

    def __init__(self, config: RunConfig, worker: Worker) -> None:
        self.config, self.worker = config, worker
        self.batches: list[tuple[int, int]] = []  # tokens of each, without and with padding

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
        self.batches = []
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
                train_dataset=self.worker.raw_rows(client).table.map(
                    lambda row: {
                        "prompt": f"### Instruction:\n{row['instruction']}\n{row['input']}\n### Response:\n",
                        "completion": row["output"],
                    },
                    remove_columns=["instruction", "input", "output"],
                    load_from_cache_file=False,
                ),
            )  # fmt: skip
            trainer.train()
        tokens, padded = map(sum, zip(*self.batches[: arguments["max_steps"]], strict=True))  # one more was prefetched
        return {"tokens": tokens, "padded": padded}

    def collate(self, rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
        """A batch padded to its longest row, with an attention mask."""
        longest = max(len(row["input_ids"]) for row in rows)
        self.batches.append((sum(len(row["input_ids"]) for row in rows), longest * len(rows)))
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            ids, missing = row["input_ids"], longest - len(row["input_ids"])
            mask = row.get("completion_mask") or [1] * len(ids)
            batch["input_ids"].append(ids + [pad] * missing)
            batch["attention_mask"].append([1] * len(ids) + [0] * missing)
            batch["labels"].append([i if m else -100 for i, m in zip(ids, mask, strict=True)] + [-100] * missing)
        return {name: torch.tensor(values) for name, values in batch.items()}


def timed(play: Callable[[int, int], dict[str, Any]], number: int, client: int) -> dict[str, float]:
    start = time.perf_counter()
    counts = play(number, client)
    return {"seconds": time.perf_counter() - start} | counts


class Plain:
    """A forward pass over 200 held-out rows, on labelled positions: the loss of each batch."""

    def __init__(self, worker: Worker, model: Any) -> None:
        self.model, self.worker = model, worker

    def rows(self, client: int) -> list[dict[str, list[int]]]:
        partition = self.worker.partition(client)
        return [partition.row(index) for index in range(min(HELD_OUT, len(partition)))]

    @torch.no_grad()
    def round(self, number: int, client: int) -> dict[str, int]:
        rows = self.rows(client)
        self.model.eval()
        for part in in_batches([len(row["input_ids"]) for row in rows], self.worker.config.train.tokens_at_once):
            logits, labels = labelled_logits(self.model, collate([rows[index] for index in part]))
            torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        self.model.train()
        return {"tokens": sum(len(row["input_ids"]) for row in rows)}


class Scored(Plain):
    """The suite's evaluation of the same rows."""

    def round(self, number: int, client: int) -> dict[str, int]:
        rows = self.rows(client)
        losses_on(self.model.eval(), rows, self.worker.config.train.tokens_at_once)
        return {"tokens": sum(len(row["input_ids"]) for row in rows)}


def measure(config: RunConfig, pairs: int, at_most: dict[str, int], overrides: list[str]) -> dict[str, list[Any]]:
    """`pairs` alternating client-rounds of each kind, in both orders, each pair on a client of its own.

    Before, one round of each warms up, and the tokens of all clients are made: the suite does that once a run.

    Args:
        at_most: rounds of kinds that take long.
    """
    worker = Worker(config)
    limit, suite = Limit(config, worker), Suite(worker)
    contenders = {
        "limit": limit, "suite": suite, "main": Main(config, overrides), "naive": Naive(config, worker),
        "plain": Plain(worker, limit.model), "scored": Scored(worker, worker.model),
    }  # fmt: skip
    for client in range(min(CLIENTS, pairs + 1)):
        worker.partition(client)
    times: dict[str, list[Any]] = {name: [] for name in contenders}
    for number in range(pairs + 1):
        for name in sorted(contenders, reverse=number % 2 == 0):
            most = at_most.get(name, pairs)
            if number > most or not most or (number == 0 and name in ("main", "naive")):  # they are always cold
                continue
            result = timed(contenders[name].round, number, number % CLIENTS)
            if number:
                times[name].append(result)
                print(f"pair {number}  {name:<6} {result['seconds']:6.2f} s", file=sys.stderr)
    return times


def summarize(times: dict[str, list[Any]]) -> dict[str, Any]:
    """Medians and spreads, and the median over the pairs of their ratios, by token: rows may differ."""
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
            "padded_tokens": int(np.mean([result.get("padded", 0) for result in results])),
        }
    for first, second in RATIOS:
        pairs = zip(times[first], times[second], strict=False)  # of a pair: both ran at about the same time
        ratios = [(a["seconds"] / a["tokens"]) / (b["seconds"] / b["tokens"]) for a, b in pairs]
        rows[f"{first}/{second}"] = statistics.median(ratios) if ratios else None
    return rows


def show(results: dict[str, Any], what: str) -> None:
    print(f"\n{what}\n{'':<8}{'median':>9}{'spread':>18}{'tokens':>9}{'with padding':>14}")
    for name, row in results.items():
        if isinstance(row, dict):
            spread = f"{row['min_s']:.2f}-{row['max_s']:.2f} s"
            print(f"{name:<8}{row['median_s']:>7.2f} s{spread:>18}{row['tokens']:>9}{row['padded_tokens']:>14}")
    ratios = [f"{first}/{second} {results[f'{first}/{second}']:.3f}" for first, second in RATIOS
              if results[f"{first}/{second}"]]  # fmt: skip
    print("   ".join([*ratios, f"peak memory of this process {bytes_text(results['peak_memory_bytes'])}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="local model folder; default: 7M random weights")
    parser.add_argument("--shape", choices=workload.SHAPES, default="7M", help="of the random weights")
    parser.add_argument("--vocab", type=int, default=32000, help="of the random weights")
    parser.add_argument("--dataset", type=Path, help="local file with instruction, input, output")
    parser.add_argument("--quantization", choices=["4", "8", "none"], default="4")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--naive-rounds", type=int, default=5, help="it takes long: in the first pairs only")
    parser.add_argument("--main-rounds", type=int, default=5, help="as --naive-rounds")
    parser.add_argument("--evaluations", type=int, default=5, help="as --naive-rounds")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument("overrides", nargs="*", help="settings, as for main.py")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        overrides = settings(options, Path(folder))
        config, at_most = compose(overrides), {"naive": options.naive_rounds, "main": options.main_rounds}
        at_most |= dict.fromkeys(["plain", "scored"], options.evaluations)
        results = summarize(measure(config, options.pairs, at_most, overrides))
    results["peak_memory_bytes"] = peak_resident_bytes()
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    steps = f"{config.train.training_arguments['max_steps']} steps of {config.batch_size} rows"
    show(results, f"one client-round: {steps}, quantization {config.model.quantization}, {machine}")
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
