"""python -m benchmarks.gpu [--models 3B 7B] [--quantizations 4 8] [--rounds 3] [--naive]
    [--output=FILE.json]

Client-rounds on OpenLLaMA shapes with random weights: memory and time do not depend on the values, so nothing is
downloaded. For every model and quantization: memory estimated, allocated and reserved, seconds of an optimizer step,
tokens a second, the share of the device's measured bf16 matrix rate, and the seconds that a base model takes to
load, quantized on the way and from the cache of `model.cache_folder`. `--naive` adds the settings of well-known
examples on the same device (fp4 with float32 compute, float32 norms and embeddings, one pass of 16, an attention
mask). Needs torch, transformers, peft, accelerate, trl, datasets and bitsandbytes; neither flwr, ray nor hydra.
On a CPU it is a test of itself: --models tiny --batch 4 --length 32.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast

import model as adapters
from learning.memory import memory_bytes, sizes
from learning.training import Task, make_trainer, train_on
from settings.schema import ClientResources, DatasetConfig, ModelConfig, RunConfig, TrainConfig
from utils import quiet_transformers

SHAPES: dict[str, dict[str, int]] = {  # of OpenLLaMA v2
    name: {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate,
        "num_attention_heads": heads, "vocab_size": vocabulary,
    }
    for name, hidden, layers, intermediate, heads, vocabulary in (
        ("3B", 3200, 26, 8640, 32, 32000), ("7B", 4096, 32, 11008, 32, 32000), ("tiny", 64, 2, 192, 2, 512)
    )
}  # fmt: skip
LORA = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.075, "target_modules": ["q_proj", "v_proj"]}
RATE = 5e-5


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


@dataclass
class Case:
    """One line of the table."""

    model: str
    quantization: str
    micro_batch_size: int
    checkpointing: bool = True


def write_weights(folder: Path, shape: str) -> Path:
    """A model of that shape with random bfloat16 weights, made on the device and saved once."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False)
    with torch.device(adapters.default_device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / shape)
    return folder / shape


def settings(case: Case, name: Path, cache: Path | None, batch: int, length: int) -> RunConfig:
    arguments = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "max_steps": 3,
        "gradient_checkpointing": case.checkpointing, "max_grad_norm": 1.0, "optim": "adamw_torch",
    }  # fmt: skip
    return RunConfig(
        model=ModelConfig(
            name=str(name), quantization=case.quantization, trust_remote_code=False, lora=dict(LORA),
            cache_folder=str(cache) if cache else None,
        ),
        dataset=DatasetConfig(partitioner={}),
        train=TrainConfig(
            learning_rate_max=RATE, learning_rate_min=RATE, seq_length=length,
            micro_batch_size=case.micro_batch_size, save_every_round=1, training_arguments=arguments,
        ),
        strategy={},
        client_resources=ClientResources(num_cpus=1, num_gpus=float(on_gpu())),
        transfer="fp32",
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

    Frozen weights need no weight gradient: 2 operations a weight and token forward, 2 backward, and 2 more where
    checkpointing computes the forward pass again; attention's products likewise, halved by the causal mask.
    """
    facts = SHAPES[shape]
    hidden, layers = facts["hidden_size"], facts["num_hidden_layers"]
    weights = layers * (4 * hidden**2 + 3 * hidden * facts["intermediate_size"]) + hidden * facts["vocab_size"]
    attention = layers * 2 * hidden * length
    return tokens * ((6 if checkpointing else 4) * weights + (4 if checkpointing else 3) * attention)


def peaks() -> dict[str, float]:
    if not on_gpu():
        return {"allocated_gb": float("nan"), "reserved_gb": float("nan")}
    return {
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def load(case: Case, weights: Path, cache: Path, batch: int, length: int) -> tuple[Any, dict[str, float]]:
    """The base model, and the seconds that it took to load; where the cache has it already, only from there."""
    known = any(cache.glob(f"{case.model}-{case.quantization}bit-*"))
    ways = [("load_s", None), ("", cache), ("cached_load_s", cache)]  # the second fills the cache
    seconds = {}
    for name, folder in ways[2:] if known else ways:
        base = None
        free()
        start = time.perf_counter()
        base = adapters.load_base(settings(case, weights, folder, batch, length).model)
        synchronize()
        if name:
            seconds[name] = time.perf_counter() - start
    return base, seconds


def run_case(
    case: Case, weights: Path, cache: Path, batch: int, length: int, rate: float, rounds: int
) -> dict[str, Any]:
    """`rounds` client-rounds of three steps, after one that warms up."""
    base, seconds = load(case, weights, cache, batch, length)
    config = settings(case, weights, cache, batch, length)
    estimate = memory_bytes(sizes(adapters.read_config(config.model), config), config)
    free()
    trainer = make_trainer(adapters.add_adapter(base, config.model), any_tokenizer(), config)
    rows = random_rows(3 * batch, length, SHAPES[case.model]["vocab_size"])
    adapter, steps = adapters.get_adapter(trainer.model), []
    for number in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        adapters.set_adapter(trainer.model, adapter)
        train_on(trainer, rows, Task(number + 1, RATE), seed=number)
        adapter = adapters.get_adapter(trainer.model)
        synchronize()
        if number:
            steps.append((time.perf_counter() - start) / 3)
    step = statistics.median(steps)
    share = step_operations(case.model, batch * length, length, case.checkpointing) / step / rate
    result = (
        {"estimated_gb": estimate / 1e9}
        | peaks()
        | {"step_s": step, "tokens_per_s": batch * length / step, "share_of_rate": share, **seconds}
    )
    del trainer, base
    return result


def run_naive(case: Case, weights: Path, batch: int, length: int) -> dict[str, Any]:
    """The same step with the settings of well-known examples."""
    free()
    quantization = BitsAndBytesConfig(load_in_4bit=case.quantization == "4", load_in_8bit=case.quantization == "8")
    device = adapters.default_device()
    base = AutoModelForCausalLM.from_pretrained(
        weights, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": device}
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    model.train()
    free()  # as in run_case: the peak is that of training
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    rows = random_rows(batch, length, SHAPES[case.model]["vocab_size"])
    ids = torch.tensor([row["input_ids"] for row in rows], device=device)
    steps = []
    for number in range(4):
        synchronize()
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        if number:
            steps.append(time.perf_counter() - start)
    result = peaks() | {"step_s": statistics.median(steps)}
    del model, base, optimizer
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["3B", "7B"])
    parser.add_argument("--quantizations", nargs="+", choices=["4", "8"], default=["4", "8"])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[16, 4])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--naive", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    quiet_transformers()
    rate, results = matrix_rate(), []
    name = torch.cuda.get_device_name() if on_gpu() else "CPU"
    print(f"{name}, {rate / 1e12:.1f} TFLOP/s in bf16; a step is {options.batch} x {options.length} tokens")
    columns = (
        "estimated_gb",
        "allocated_gb",
        "reserved_gb",
        "step_s",
        "tokens_per_s",
        "share_of_rate",
        "load_s",
        "cached_load_s",
    )
    print(f"{'model':<28}" + "".join(f"{column:>15}" for column in columns))
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.models:
            weights = write_weights(Path(folder), shape)
            for quantization in options.quantizations:
                cases = [Case(shape, quantization, min(micro, options.batch)) for micro in options.micro_batches]
                runs = [(f"passes of {case.micro_batch_size}", case) for case in cases]
                for label, case in [*runs, *([("naive", cases[0])] if options.naive else [])]:
                    try:
                        if label == "naive":
                            facts = run_naive(case, weights, options.batch, options.length)
                        else:
                            cache = Path(folder) / "cache"
                            facts = run_case(case, weights, cache, options.batch, options.length, rate, options.rounds)
                    except torch.cuda.OutOfMemoryError:
                        facts = {"error": "out of memory"}
                    free()
                    results.append({"model": shape, "quantization": quantization, "kind": label, **facts})
                    if options.output:
                        whole = {"device": name, "bf16_flops": rate, "results": results}
                        options.output.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
                    cells = "".join(f"{facts[c]:>15.3g}" if c in facts else f"{'-':>15}" for c in columns)
                    print(f"{f'{shape} {quantization}-bit, {label}':<28}{cells}", flush=True)


if __name__ == "__main__":
    main()
