"""Does the federation help? Beside it, with as many steps: the base model, each client alone, all data in one place.

A sweep over `baseline=null,alone,central` writes baselines.md, baselines.csv and baselines.png when it ends; so does
`python main.py experiment=baselines`. `settings.schema.as_baseline` says what the runs of a baseline do.
"""

import csv
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from runs.plots import plot_baselines
from runs.reading import COMPLETE, Run, cell, differing, label

ARMS = {"base": "base model", "alone": "each client alone", "null": "federated", "central": "central"}
FIGURES = {"loss": "held-out loss", "exact_match": "exact match", "rouge_l": "ROUGE-L"}


def report(runs: Sequence[Run], output: Path) -> str:
    """Write baselines.md, .csv and .png into `output`; returns the first. Nothing, if no two arms can be compared.

    A line for whatever differs besides the seed; values are means over seeds with their standard deviations.
    """
    table = {setting: arms for setting, arms in measured(runs).items() if len(arms.keys() - {"base"}) > 1}
    if not table:
        return ""
    rows = [line for setting, arms in table.items() for line in lines_of(setting, arms)]
    with (output / "baselines.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["settings", "metric", "arm", "mean", "deviation", "seeds", "steps", "rows"], *rows]
        )
    header = ["", "", *ARMS.values(), "federated / central"]
    lines = [header, ["---"] * len(header)]
    for setting, arms in table.items():
        for key, name in FIGURES.items():
            if any(run.get(key) is not None for found in arms.values() for run in found):
                lines.append([setting, name, *(text_of(values(arms, arm, key)) for arm in ARMS), ratio(arms, key)])
    text = "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines) + "\n" + footnote(table)
    (output / "baselines.md").write_text(text, encoding="utf-8")
    losses = {
        setting: {ARMS[arm]: values(arms, arm, "loss") for arm in ARMS if arm in arms}
        for setting, arms in table.items()
    }
    plot_baselines(losses, output / "baselines.png")
    return text


# what does not tell one comparison from another: the arms, their repetitions, and how they were measured
UNRELATED = re.compile(r"baseline$|seed$|evaluate\.|strategy\.fraction_evaluate$|hydra\.")
Measured = dict[str, dict[str, list[dict[str, Any]]]]  # by settings and arm: what each seed's run found


def measured(runs: Sequence[Run]) -> Measured:
    table: Measured = defaultdict(lambda: defaultdict(list))
    keys = [key for key in differing(runs) if not UNRELATED.match(key)]
    for run in runs:
        last = run.metrics[-1] if run.metrics else {}
        if run.status != COMPLETE or "global" not in last.get("held_out", {}):
            continue
        arm, setting = run.settings.get("baseline", "null"), label(run, keys) or "all"
        models = run.results["clients_used"] if arm == "alone" else 1
        effort = {
            "steps": Fraction(run.results["optimizer_steps"], models),
            "rows": Fraction(run.results["rows_trained"], models),
        }
        table[setting][arm].append(figures_of(last["held_out"]["global"]) | effort)
        if arm == "null" and "global" in run.metrics[0].get("held_out_before", {}):
            table[setting]["base"].append(figures_of(run.metrics[0]["held_out_before"]["global"]))
    return table


def figures_of(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in FIGURES if key in found}


def values(arms: Mapping[str, Sequence[Mapping[str, Any]]], arm: str, key: str) -> list[float]:
    return [run[key] for run in arms.get(arm, ()) if key in run]


def spread(numbers: Sequence[float]) -> float:
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def text_of(numbers: Sequence[float]) -> str:
    if not numbers:
        return ""
    return f"{statistics.mean(numbers):.3f}" + (f" ± {spread(numbers):.3f}" if len(numbers) > 1 else "")


def ratio(arms: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> str:
    federated, central = values(arms, "null", key), values(arms, "central", key)
    if not federated or not central or not statistics.mean(central):
        return ""
    return f"{statistics.mean(federated) / statistics.mean(central):.2f}"


def lines_of(setting: str, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[Any]]:
    lines = []
    for arm in ARMS:
        steps, rows = ({run.get(key, 0) for run in arms.get(arm, ())} for key in ("steps", "rows"))
        for key in FIGURES:
            if numbers := values(arms, arm, key):
                effort = [" ".join(map(str, sorted(counts))) for counts in (steps, rows)]
                lines.append(
                    [setting, key, ARMS[arm], statistics.mean(numbers), spread(numbers), len(numbers), *effort]
                )
    return lines


def footnote(table: Measured) -> str:
    """How much each model was trained; a warning if that is not the same for all."""
    efforts = {
        (run["steps"], run["rows"])
        for arms in table.values()
        for found in arms.values()
        for run in found
        if "steps" in run
    }
    if len(efforts) == 1:
        steps, rows = efforts.pop()
        return f"Each model was trained for {steps} optimizer steps on {rows} rows, repetitions counted.\n"
    listed = ", ".join(f"{steps} and {rows}" for steps, rows in sorted(efforts))
    return f"Warning: the models were not trained equally: steps and rows of {listed}.\n"
