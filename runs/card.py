"""The model card of a checkpoint: README.md in the Hub's format, made from card.md, with the curves beside it."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig

from dataset import kind_of
from model import TEMPLATE_FILE
from runs.plots import plot_loss
from runs.reading import markdown
from settings.schema import HUB_ID, SHIPPED_NAMES, RunConfig
from utils import CARD_FILE, PLOT_FILE, bytes_sent, bytes_text, local_path, totals_so_far

FIGURES = {"loss": ".4f", "perplexity": ".3f", "token_accuracy": ".1%", "exact_match": ".1%", "rouge_l": ".3f"}
LIBRARIES = ("flwr", "peft", "transformers", "torch", "bitsandbytes")


def write_card(
    folder: Path, config: RunConfig, lora: LoraConfig, metrics: Sequence[Mapping[str, Any]], own_data: bool
) -> None:
    """Write README.md and train_loss.png into a `folder`; no name of a local file: a card is for everybody.

    `metrics` are the lines up to this checkpoint; `own_data`: clients trained on rows that only they have.
    """
    found, before = metrics[-1].get("held_out", {}), metrics[0].get("held_out_before", {})
    if config.baseline == "alone":
        found = before = {}
    modules = lora.target_modules or ()
    card = ModelCard.from_template(
        metadata(config, found, own_data),
        template_path=str(Path(__file__).with_name("card.md")),
        config=config,
        lora=lora,
        modules=modules if isinstance(modules, str) else ", ".join(sorted(modules)),
        data="the clients' own" if own_data else public(config.dataset.name, "private"),
        rows={int(partition): rows for line in metrics for partition, rows in line["num_examples"].items()},
        total=(total := totals_so_far(metrics)),
        sent=bytes_text(bytes_sent(total)),
        found=found,
        tables={kind: results(kind, found[kind], before.get(kind)) for kind in ("global", "clients") if kind in found},
        libraries=", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        plot=PLOT_FILE,
        template=TEMPLATE_FILE,
        public=public,
    )
    (folder / CARD_FILE).write_text(f"{card}\n", encoding="utf-8")
    plot_loss(metrics, folder / PLOT_FILE, f"{config.num_clients} clients")


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
    return bool(HUB_ID.fullmatch(name)) and local_path(name) is None and kind_of(Path(name)) is None


def public(name: str, otherwise: str) -> str:
    """`name`, unless it is a path on somebody's machine."""
    return name if on_hub(name) or name in SHIPPED_NAMES else otherwise


def results(kind: str, after: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """A table of all figures, before the first round and now, and of each category's.

    What categories clients' own rows have is for nobody else; names of categories may be anybody's: no markup.
    """
    keys = [key for key in FIGURES if key in after]
    lines = ({"before": before} if before else {}) | {"after": after}
    if kind == "global":
        lines |= {f"after, {name}": figures for name, figures in after.get("by_category", {}).items()}
    rows = (
        [name, *(format(figures[key], FIGURES[key]) if key in figures else "" for key in keys)]
        for name, figures in lines.items()
    )
    return markdown(["", *(key.replace("_", " ") for key in keys)], rows, special="\\`*_{}[]<>|")
