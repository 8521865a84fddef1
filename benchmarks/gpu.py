"""python -m benchmarks.gpu [--cases 7B:4:16 7B:4:4:whole 3B:8:16 7B:4:naive ...] [--kernels] [--output=FILE.json]

Client-rounds on OpenLLaMA shapes with random weights: memory and time do not depend on the values, so nothing is
downloaded, and the weights are made on the device. A case is MODEL:BITS:ROWS, with so many rows in a pass; `:whole`
after it means without checkpointing. For each: peak memory allocated and reserved, seconds of an optimizer step,
tokens a second, and the share of the device's measured bf16 matrix rate. MODEL:BITS:naive has the settings of
well-known examples on the same device (fp4 with float32 compute, float32 norms and embeddings, one pass of all rows,
an attention mask, full logits). `--kernels` adds where a step's time goes on the device.

Every token is labelled, which is the most that a step can take. A tiny model goes first, to find what cannot work at
all. Each case runs in a process that is replaced when one fails, and the results are written after each. Needs torch,
transformers, peft, accelerate, trl, datasets and bitsandbytes; neither flwr, ray nor hydra.
On a CPU it is a test of itself: --cases tiny:4:2 tiny:4:naive --batch 4 --length 32.
"""

import argparse
import gc
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import model as adapters
from learning.training import Task, make_trainer, train_on
from settings.schema import ClientResources, DatasetConfig, ModelConfig, RunConfig, TrainConfig
from utils import quiet_transformers, write_json

SHAPES: dict[str, dict[str, int]] = {  # of OpenLLaMA v2
    name: {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate,
        "num_attention_heads": heads, "vocab_size": vocabulary,
    }
    for name, hidden, layers, intermediate, heads, vocabulary in (
        ("3B", 3200, 26, 8640, 32, 32000), ("7B", 4096, 32, 11008, 32, 32000), ("tiny", 64, 2, 192, 2, 512)
    )
}  # fmt: skip
DEFAULT = (
    "7B:4:16", "7B:4:4", "7B:4:16:whole", "3B:4:16", "3B:8:16", "7B:4:naive", "7B:8:16", "3B:4:4", "3B:8:4", "7B:8:4",
    "3B:4:16:whole",
)  # fmt: skip
PREFLIGHT = ("tiny:4:2", "tiny:8:2", "tiny:4:4:whole", "tiny:4:naive")
LORA = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.075, "target_modules": ["q_proj", "v_proj"]}
RATE = 5e-5
STEPS = 3  # of a measured client-round
COLUMNS = ("allocated_gb", "reserved_gb", "step_s", "tokens_per_s", "share_of_rate")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    batch: int
    length: int
    rate: float
    """The device's, in floating-point operations a second."""
    kernels: bool = False

    @property
    def shape(self) -> str:
        return self.name.split(":")[0]

    @property
    def bits(self) -> str:
        return self.name.split(":")[1]

    @property
    def is_naive(self) -> bool:
        return self.name.endswith(":naive")

    @property
    def rows(self) -> int:
        """Rows of a pass."""
        return self.batch if self.is_naive else min(self.batch, int(self.name.split(":")[2]))

    @property
    def checkpointing(self) -> bool:
        return not self.name.endswith(":whole")


def on_gpu() -> bool:
    return adapters.default_device() == "cuda"


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_base(case: Case, quantization: BitsAndBytesConfig) -> Any:
    """A model of the case's shape with random bfloat16 weights, quantized as transformers does when it loads them."""
    shape = LlamaConfig(**SHAPES[case.shape], max_position_embeddings=2048, tie_word_embeddings=False)
    with torch.device(adapters.default_device()):
        weights = LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16).state_dict()
    return LlamaForCausalLM.from_pretrained(
        None, config=shape, state_dict=weights, quantization_config=quantization, dtype=torch.bfloat16,
        device_map={"": adapters.default_device()},
    )  # fmt: skip


def settings(case: Case) -> RunConfig:
    arguments = {
        "per_device_train_batch_size": case.batch, "gradient_accumulation_steps": 1, "max_steps": STEPS,
        "gradient_checkpointing": case.checkpointing, "max_grad_norm": 1.0, "optim": "adamw_torch",
    }  # fmt: skip
    return RunConfig(
        model=ModelConfig(
            name="random", quantization=case.bits, trust_remote_code=False, lora=dict(LORA), cache_folder=None
        ),
        dataset=DatasetConfig(partitioner={}),
        train=TrainConfig(
            learning_rate_max=RATE, learning_rate_min=RATE, seq_length=case.length, micro_batch_size=case.rows,
            save_every_round=1, training_arguments=arguments,
        ),
        client_resources=ClientResources(num_cpus=1, num_gpus=float(on_gpu())),
        strategy={},
        seed=0,
    )  # fmt: skip


def random_rows(count: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    tokens = np.random.default_rng(0).integers(3, vocabulary, (count, length))
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens]


def any_tokenizer() -> PreTrainedTokenizerFast:
    """The trainer wants a tokenizer, but rows come as numbers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, "<unk>")),
        eos_token="</s>",
        pad_token="</s>",
    )


def matrix_rate() -> float:
    """Floating-point operations a second of large bf16 matrix products here: what the device really reaches."""
    size = 8192 if on_gpu() else 512
    device = adapters.default_device()
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    start = time.perf_counter()
    repeats = 30
    for _ in range(repeats):
        a @ b
    synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def step_operations(shape: str, tokens: int, length: int, checkpointing: bool = True) -> float:
    """Floating-point operations of one optimizer step as the device does them.

    Frozen weights need no weight gradient: 2 operations a weight and token forward, 2 backward, and in the layers 2
    more where checkpointing computes the forward pass again; attention's products likewise, halved by the causal mask.
    """
    facts = SHAPES[shape]
    hidden, layers = facts["hidden_size"], facts["num_hidden_layers"]
    weights = layers * (4 * hidden**2 + 3 * hidden * facts["intermediate_size"])
    attention = layers * 2 * hidden * length
    in_layers = (6 if checkpointing else 4) * weights + (4 if checkpointing else 3) * attention
    return tokens * (in_layers + 4 * hidden * facts["vocab_size"])


def peaks() -> dict[str, float]:
    if not on_gpu():
        return {"allocated_gb": float("nan"), "reserved_gb": float("nan")}
    return {
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


@contextmanager
def clock(times: list[float]) -> Iterator[None]:
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    times.append(time.perf_counter() - start)


def run_suite(case: Case) -> dict[str, Any]:
    """Client-rounds of this suite; the first one warms up."""
    config = settings(case)
    base = random_base(case, adapters.quantized_in(case.bits, torch.bfloat16)).requires_grad_(False)
    trainer = make_trainer(adapters.add_adapter(base, config.model), any_tokenizer(), config)
    rows = random_rows(STEPS * case.batch, case.length, SHAPES[case.shape]["vocab_size"])
    adapter, times = adapters.get_adapter(trainer.model), list[float]()

    def client_round() -> None:
        adapters.set_adapter(trainer.model, adapter)
        train_on(trainer, rows, Task(1, RATE), seed=0)
        adapters.get_adapter(trainer.model)

    free()
    for _ in range(3):
        with clock(times):
            client_round()
    step = min(times[1:]) / STEPS
    done = step_operations(case.shape, case.batch * case.length, case.length, case.checkpointing)
    return peaks() | told(case, step) | {"share_of_rate": done / step / case.rate} | kernels(case, client_round)


def run_naive(case: Case) -> dict[str, Any]:
    """The same step with the settings of well-known examples."""
    bits = BitsAndBytesConfig(load_in_4bit=case.bits == "4", load_in_8bit=case.bits == "8")
    base = prepare_model_for_kbit_training(random_base(case, bits), use_gradient_checkpointing=True)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
    free()  # as in run_suite: the peak is that of training
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    rows, times = random_rows(case.batch, case.length, SHAPES[case.shape]["vocab_size"]), list[float]()
    ids = torch.tensor([row["input_ids"] for row in rows], device=adapters.default_device())

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        with clock(times):
            step()
    return peaks() | told(case, statistics.median(times[1:])) | kernels(case, step)


def told(case: Case, step_s: float) -> dict[str, float]:
    return {"step_s": step_s, "tokens_per_s": case.batch * case.length / step_s}


def kernels(case: Case, work: Callable[[], None]) -> dict[str, Any]:
    """Seconds on the device by kernel, the longest first, while `work` is done once more."""
    if not (case.kernels and on_gpu()):
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:  # with the CPU's, a 7B takes a minute to sort
        work()
        synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in profiled.events():
        seconds[event.name[:120]] += event.self_device_time_total / 1e6
    return {"kernels": sorted(seconds.items(), key=lambda line: -line[1])[:40]}


def run_case(case: Case) -> dict[str, Any]:
    quiet_transformers()
    try:
        return run_naive(case) if case.is_naive else run_suite(case)
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        free()


class Child:
    """A process that runs cases, and is replaced when one fails."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns there, or what went wrong."""
        self.pool = self.pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            return self.pool.submit(function, *arguments).result(timeout=240)
        except Exception as error:  # whatever it is, the other cases go on
            self.close()
            return {"error": f"{type(error).__name__}: {error}"[:2000]}

    def close(self) -> None:
        if self.pool:
            for process in list((self.pool._processes or {}).values()):
                process.terminate()
            self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=DEFAULT)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=210.0, help="no case starts later than this")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    start, child = time.monotonic(), Child()
    rate = child.run(matrix_rate)
    if isinstance(rate, dict):  # an error: the rest can be measured all the same
        print(rate["error"])
        rate = float("nan")
    whole = {"rate": rate, "torch": torch.__version__, "batch": options.batch, "length": options.length, "results": []}
    print(f"bf16 matrix products: {rate} operations a second; a step is {options.batch} x {options.length} tokens")
    print(f"{'case':<18}" + "".join(f"{column:>15}" for column in COLUMNS))
    small = [Case(name, 4, 32, rate) for name in PREFLIGHT]
    for case in [*small, *(Case(name, options.batch, options.length, rate, options.kernels) for name in options.cases)]:
        if time.monotonic() - start > options.seconds:
            print(f"{case.name:<18} no time left")
            continue
        begun = time.monotonic()
        facts = child.run(run_case, case)
        whole["results"].append({"case": case.name, **facts, "wall_s": time.monotonic() - begun})
        cells = "".join(f"{facts[c]:>15.3g}" if c in facts else f"{'-':>15}" for c in COLUMNS)
        print(f"{case.name:<18}{cells}  {facts.get('error', '')[:200]}", flush=True)
        if options.output:
            write_json(options.output, whole)
    child.close()


if __name__ == "__main__":
    main()
