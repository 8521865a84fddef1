"""The model card of a checkpoint: README.md in the Hub's format, with the curves beside it."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from peft import LoraConfig

from dataset import READERS
from model import TEMPLATE_FILE
from runs.plots import plot_loss
from settings.schema import HUB_ID, SHIPPED_NAMES, RunConfig
from utils import CARD_FILE, PLOT_FILE, bytes_text, local_path, totals_so_far

FIGURES = {
    "loss": "{:.4f}",
    "perplexity": "{:.3f}",
    "token_accuracy": "{:.1%}",
    "exact_match": "{:.1%}",
    "rouge_l": "{:.3f}",
}
LIBRARIES = ("flwr", "peft", "transformers", "torch", "bitsandbytes")
LOADING = {
    "4": """{"quantization_config": BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)}""",
    "8": '{"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}',
    "none": '{"dtype": torch.bfloat16}',
}


ORIGIN = {
    None: "The clients of a federation trained it together, each on data that it showed to nobody: only adapters "
    "travelled.",
    "central": "A baseline, to compare a federation with: trained on all data in one place.",
    "alone": "A baseline, to compare a federation with: the average of what clients learned each alone. Nobody has "
    "measured it: the figures of that run are those of each client's own adapter.",
}


def write_card(
    folder: Path, config: RunConfig, lora: LoraConfig, metrics: Sequence[Mapping[str, Any]], own_data: bool
) -> None:
    """Write README.md and train_loss.png into a checkpoint's `folder`.

    Names of local files and folders are left out: a card is for everybody.

    Args:
        metrics: the lines of metrics.jsonl up to this checkpoint.
        own_data: whether clients trained on rows that only they have.
    """
    last = metrics[-1] if metrics else {}
    found, before = last.get("held_out", {}), (metrics[0] if metrics else {}).get("held_out_before", {})
    if config.baseline == "alone":
        found = before = {}
    tables = [f"## {WHOSE[kind]}\n\n{table}" for kind, table in tables_of(found, before).items()]
    parts = [
        f"---\n{metadata(config, found, own_data).to_yaml()}\n---",
        f"# LoRA adapter for {public(config.model.name, 'a private model')}",
        f"{ORIGIN[config.baseline]} This is the state after round {last.get('round', 0)} of {config.num_rounds}.",
        *tables,
        f"![Loss by round]({PLOT_FILE})",
        "## Training",
        "| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in facts(config, lora, metrics, own_data).items()),
        "## How to load it",
        how_to_load(config),
    ]
    (folder / CARD_FILE).write_text("\n\n".join(part.rstrip() for part in parts) + "\n", encoding="utf-8")
    if metrics:
        plot_loss(metrics, folder / PLOT_FILE, f"{config.num_clients} clients")


WHOSE = {"global": "On held-out rows", "clients": "On rows that the clients held out, other clients' each time"}


def tables_of(found: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, str]:
    """A table of figures for each kind of held-out rows; what categories clients' own rows have is for nobody else."""
    categories = found.get("global", {}).get("by_category", {})
    return {
        kind: results(found[kind], before.get(kind, {}), categories if kind == "global" else {})
        for kind in WHOSE
        if kind in found
    }


def metadata(config: RunConfig, found: Mapping[str, Any], own_data: bool) -> ModelCardData:
    """What the Hub reads; names that it could not resolve are left out."""
    held_out = config.dataset.eval_name or ""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=held_out if on_hub(held_out) else "local",
            dataset_name=f"held out, {public(held_out, 'private')}",
            metric_type=key,
            metric_value=found["global"][key],
        )
        for key in FIGURES
        if key in found.get("global", {})
    ]
    return ModelCardData(
        model_name="federated LoRA adapter",
        base_model=config.model.name if on_hub(config.model.name) else None,
        datasets=[config.dataset.name] if on_hub(config.dataset.name) and not own_data else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "federated-learning", "flower"],
        eval_results=results or None,
    )


def on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and local_path(name) is None and Path(name).suffix not in READERS


def public(name: str, otherwise: str) -> str:
    """`name`, unless it is a path on somebody's machine."""
    return name if on_hub(name) or name in SHIPPED_NAMES else otherwise


def results(after: Mapping[str, Any], before: Mapping[str, Any], by_category: Mapping[str, Any]) -> str:
    """A table of all figures, before the first round and now, and of each category's."""
    lines = ["| | " + " | ".join(key.replace("_", " ") for key in FIGURES if key in after) + " |"]
    lines.append("|---" * (1 + sum(key in after for key in FIGURES)) + "|")
    named = {"before": before} if before else {}
    named |= {"after": after} | {f"after, {name}": figure for name, figure in by_category.items()}
    for name, figure in named.items():
        cells = [text.format(figure[key]) if key in figure else "" for key, text in FIGURES.items() if key in after]
        lines.append(f"| {' | '.join([cell(name), *cells])} |")
    if "answers" in after:
        lines.append(f"\nExact match and ROUGE-L are of {after['answers']} answers.")
    return "\n".join(lines)


def cell(text: str) -> str:
    """`text`, which may be anybody's, inside a Markdown table: no markup, no new cell."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(text.split()))


def facts(config: RunConfig, lora: LoraConfig, metrics: Sequence[Mapping[str, Any]], own_data: bool) -> dict[str, Any]:
    train, total = config.train, totals_so_far(metrics)
    rows = {int(p): n for line in metrics for p, n in line["num_examples"].items()}
    data = "the clients' own" if own_data else public(config.dataset.name, "private")
    modules = (
        lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(sorted(lora.target_modules or ()))
    )
    return {
        "base model": f"{public(config.model.name, 'private')}, quantization {config.model.quantization}",
        "data": f"{data}; {sum(rows.values())} rows of the {len(rows)} clients that took part",
        "federation": f"{config.num_clients} clients, {config.clients_per_round} in each round, "
        f"{config.strategy['_target_'].rsplit('.', 1)[-1]}",
        "rounds": f"{total.get('rounds', 0)} of {config.num_rounds}",
        "optimizer steps": f"{train.training_arguments['max_steps']} of {config.batch_size} rows a round and client",
        "learning rate": f"{train.learning_rate_max:g} to {train.learning_rate_min:g}, cosine over the rounds",
        "LoRA": f"r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout:g}, {modules}",
        "longest row": f"{train.seq_length} tokens",
        "sent": f"{bytes_text(total.get('bytes_down', 0) + total.get('bytes_up', 0))} as {config.transfer}",
        "seed": config.seed,
        "libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }


def how_to_load(config: RunConfig) -> str:
    name = public(config.model.name, "BASE_MODEL")
    return f"""```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

as_in_training = {LOADING[config.model.quantization]}
base = AutoModelForCausalLM.from_pretrained("{name}", **as_in_training)
model = PeftModel.from_pretrained(base, "THIS_REPOSITORY_OR_FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("{name}")
tokenizer.chat_template = open("{TEMPLATE_FILE}").read()  # the prompt of its training, in this repository
messages = [{{"role": "user", "content": "QUESTION"}}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0], skip_special_tokens=True))
```"""
