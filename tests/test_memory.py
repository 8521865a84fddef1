"""What a client takes in memory: the estimate against known floors and against what autograd really keeps."""

import mmap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma4TextConfig, LlamaConfig, LlamaForCausalLM, MambaConfig

import client
import model as adapters
from learning import memory
from learning.training import Task
from machine import gpus
from settings.compose import compose
from settings.schema import SettingsError
from tests.federation import small
from tests.test_client import start
from tests.test_model import OPEN_LLAMA

GIB = 2**30


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(adapters, "compute_dtype", lambda *_: torch.bfloat16)


@pytest.fixture
def card(monkeypatch):
    """Makes NVIDIA's driver know one GPU with so many GiB, all of them free."""

    def make(gib: float) -> None:
        monkeypatch.setattr(gpus, "cards", lambda: [gpus.Card("GPU-test", "NVIDIA Test", gib * GIB, gib * GIB)])
        monkeypatch.setattr(gpus, "given", lambda: None)

    return make


def sizes_of(kind, config, **changed):
    return memory.sizes(LlamaConfig(**{"vocab_size": 32000} | OPEN_LLAMA[kind][0] | changed), config)


def checkpointed(is_on, *overrides):
    return compose([f"train.training_arguments.gradient_checkpointing={str(is_on).lower()}", *overrides])


FLOORS = {("7b", "8"): (12.2, 9.0), ("7b", "4"): (9.0, 5.9), ("3b", "8"): (7.4, 5.2), ("3b", "4"): (5.9, 3.6)}


@pytest.mark.parametrize(("kind", "quantization"), FLOORS)
@pytest.mark.parametrize("micro", [16, 4])
def test_estimate_is_near_the_computed_floors(kind, quantization, micro, as_on_a_gpu):
    config = checkpointed(True, f"model.quantization={quantization}", f"train.micro_batch_size={micro}")
    estimate = memory.memory_bytes(sizes_of(kind, config), config) / 1e9
    floor = FLOORS[kind, quantization][0 if micro == 16 else 1]
    assert 0.85 * floor < estimate < 1.15 * floor


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]]
)
@pytest.mark.parametrize("key_heads", [4, 1])
def test_without_checkpointing_it_counts_what_autograd_keeps(targets, key_heads, as_on_a_gpu):
    shapes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": key_heads}
    shapes |= {"vocab_size": 64, "num_hidden_layers": 4}
    config = checkpointed(False, f"model.lora.target_modules=[{','.join(targets)}]")
    size = memory.sizes(LlamaConfig(**shapes), config)
    base = LlamaForCausalLM(LlamaConfig(**shapes)).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, lora_dropout=0.1))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value):
        if (where := value.untyped_storage().data_ptr()) not in weights:
            kept[where] = value
        return value

    tokens = 2 * 48
    with adapters.arithmetic(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model.get_base_model().model(input_ids=torch.randint(0, 64, (2, 48)), use_cache=False)
    # a CPU keeps dropout's masks in 4 bytes a value where a GPU takes one, and attention's probabilities
    measured = sum(
        v.untyped_storage().nbytes() for v in kept.values() if not (v.dim() == 4 and v.shape[-2:] == (48, 48))
    )
    masks = 3 * size.adapted * tokens
    assert memory.kept_bytes(size, "4", 2) * tokens == pytest.approx(measured - masks, rel=0.15)


@pytest.mark.parametrize("vocabulary", [32_000, 128_000, 256_000])
def test_a_large_vocabulary_costs_its_weights_and_little_more(vocabulary, as_on_a_gpu):
    config = checkpointed(True)
    few, many = (sizes_of("7b", config, vocab_size=count) for count in (32_000, vocabulary))
    tables = 2 * 2 * (vocabulary - 32_000) * 4096
    more = memory.memory_bytes(many, config) - memory.memory_bytes(few, config)
    assert tables <= more < tables + 0.5e9


@pytest.mark.parametrize(("gib", "micro", "fits"), [(24, 4, True), (16, 4, True), (12, 4, True), (12, 16, False)])
def test_plan_says_whether_the_default_model_fits_a_card(gib, micro, fits, card, as_on_a_gpu):
    card(gib)
    config = compose(
        [f"train.micro_batch_size={micro}", "model.quantization=8" if not fits else "model.quantization=4"]
    )
    text = memory.describe_memory(config, sizes_of("7b", config))
    assert "NVIDIA Test" in text
    assert ("DOES NOT FIT, it helps: " in text) is not fits


@pytest.mark.parametrize(("gib", "is_on"), [(80, False), (24, False), (12, True)])
def test_checkpointing_is_off_where_memory_allows(gib, is_on, card, as_on_a_gpu):
    card(gib)
    config = compose()
    chosen = memory.decided(config, sizes_of("7b", config), memory.place(config))
    assert chosen.train.training_arguments["gradient_checkpointing"] is is_on
    text = memory.describe_memory(config, sizes_of("7b", config))
    assert ("checkpointing is on, without it takes " in text) is is_on
    assert ("checkpointing is off" in text) is not is_on


def test_workers_that_share_a_gpu_share_its_memory(card, as_on_a_gpu):
    card(24)
    whole, half = compose(), compose(["client_resources.num_gpus=0.5"])
    here = memory.place(whole)
    assert memory.budget_bytes(whole, here) == pytest.approx(0.9 * 24 * GIB - 1e9)
    assert memory.budget_bytes(half, here) == pytest.approx(0.9 * 12 * GIB - 1e9)
    assert memory.decided(half, sizes_of("7b", half), here).train.training_arguments["gradient_checkpointing"] is True


def test_no_gpu_is_looked_at_where_none_is_used(card):
    card(24)
    assert memory.place(compose(["client_resources.num_gpus=0"])).name == "CPU, main memory"


def test_without_a_gpu_main_memory_counts(monkeypatch):
    monkeypatch.setattr(gpus, "cards", list)
    assert memory.place(compose()).name == "CPU, main memory"


def test_answers_are_part_of_the_estimate(as_on_a_gpu):
    config = checkpointed(True, "train.micro_batch_size=16")
    asked = checkpointed(True, "train.micro_batch_size=16", "evaluate.answers=10")
    size = sizes_of("7b", config)
    assert size.keys_and_values == 2 * 32 * 4096
    without = memory.memory_bytes(size, config)
    assert memory.memory_bytes(size, asked) - without > 0.5e9  # 8,192 tokens of 0.5 MB, beside what training takes


def test_keys_and_values_are_counted_layer_by_layer():
    """Gemma 4 has wider heads in every sixth layer; Mamba has none."""
    layers = ["sliding_attention"] * 5 + ["full_attention"]
    gemma = Gemma4TextConfig(
        num_hidden_layers=6, layer_types=layers, head_dim=256, global_head_dim=512, num_key_value_heads=2,
        num_global_key_value_heads=1,
    )  # fmt: skip
    expected = 2 * sum(layer.head_dim * layer.num_key_value_heads for layer in gemma.per_layer_config)
    assert memory.keys_and_values(gemma) == expected > 0
    assert memory.keys_and_values(LlamaConfig(**OPEN_LLAMA["7b"][0])) == 2 * 32 * 4096
    assert memory.keys_and_values(MambaConfig()) == 0


def test_advice_is_ordered_by_what_it_saves():
    config = small("client_resources.num_gpus=0.5", "model.quantization=8", "train.micro_batch_size=4")
    size = sizes_of("7b", config)
    now = memory.memory_bytes(size, config)
    assert now > memory.memory_bytes(size, small("model.quantization=4")) > 0
    text = memory.advice_on(config, size)
    numbers = [part.split("about ")[1].split(" ")[:2] for part in text.split(", ")]
    values = [float(value) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit] for value, unit in numbers]
    assert values == sorted(values, reverse=True)
    assert len(values) >= 3


@pytest.mark.parametrize("value", ["maybe", "1", "null"])
def test_checkpointing_is_true_false_or_auto(value):
    with pytest.raises(SettingsError, match="gradient_checkpointing=.*: use true, false, or auto"):
        compose([f"train.training_arguments.gradient_checkpointing={value}"])


@pytest.mark.parametrize(
    ("here", "is_on"), [(memory.Place("large", 1e12, 1e12), False), (memory.Place("no", 0, 0), True)]
)
def test_a_worker_decides_by_its_own_memory_and_trains_the_same(here, is_on, monkeypatch):
    monkeypatch.setattr(memory, "place", lambda config: here)
    auto = client.Worker(small("train.training_arguments.gradient_checkpointing=auto"))
    said = client.Worker(small(f"train.training_arguments.gradient_checkpointing={str(not is_on).lower()}"))
    assert auto.trainer.args.gradient_checkpointing is is_on
    found, expected = (client.fine_tune(worker, start(worker.config), 0, Task(1, 1e-3))[0] for worker in (auto, said))
    assert all((found[name] == expected[name]).all() for name in expected)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not let a process forget its peak"
)
def test_peak_memory_starts_anew():
    cpu = torch.device("cpu")
    memory.start_peak(cpu)
    with mmap.mmap(-1, 240_000_000) as block:  # goes back to the system at once, which the allocator's memory need not
        block.write(bytes(240_000_000))
    high = memory.peak(cpu)["peak_memory_bytes"]
    memory.start_peak(cpu)
    assert memory.peak(cpu)["peak_memory_bytes"] < high - 200e6
