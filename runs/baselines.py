"""Does the federation help? Beside it, with as many steps: the base model, each client alone, all data in one place.

A sweep over `baseline=null,alone,central` writes baselines.md, baselines.csv and baselines.png when it ends; so does
`python main.py experiment=baselines`. `settings.schema.as_baseline` says what the runs of a baseline do.
"""

import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import pandas as pd

from runs.plots import plot_baselines
from runs.reading import COMPLETE, Run, differing, label, markdown

ARMS = {"base": "base model", "alone": "each client alone", "null": "federated", "central": "central"}
FIGURES = {"loss": "held-out loss", "exact_match": "exact match", "rouge_l": "ROUGE-L"}
# what does not tell one comparison from another: the arms, their repetitions, and how they were measured
UNRELATED = re.compile(r"baseline$|seed$|evaluate\.|strategy\.fraction_evaluate$|hydra\.")
COLUMNS = ["settings", "arm", "metric", "value", "steps", "rows"]


def report(runs: Sequence[Run], output: Path) -> str:
    """Write baselines.md, .csv and .png into `output`; returns the first. Nothing, if no two arms can be compared.

    A line for whatever differs besides the seed; values are means over seeds with their standard deviations.
    """
    found = measured(runs)
    if found.empty:
        return ""
    groups = found.groupby(["settings", "arm", "metric"], observed=True)
    seeds, values = groups.size(), groups["value"]
    deviation = values.std(skipna=False).where(seeds > 1, 0.0)
    table = pd.DataFrame({"mean": values.mean(skipna=False), "deviation": deviation, "seeds": seeds})
    table = table.join(groups[["steps", "rows"]].agg(lambda counts: " ".join(map(str, sorted(set(counts))))))
    table.swaplevel("arm", "metric").to_csv(output / "baselines.csv")
    text = f"{for_people(table)}\n{footnote(found)}"
    (output / "baselines.md").write_text(text, encoding="utf-8")
    plot_baselines(found[found["metric"] == "loss"], output / "baselines.png")
    return text


def measured(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each figure of each complete run, where at least two arms have the same settings."""
    keys = [key for key in differing(runs) if not UNRELATED.match(key)]
    found = pd.DataFrame([row for run in runs for row in figures_of(run, keys)], columns=COLUMNS)
    arms = found[found["arm"] != ARMS["base"]].groupby("settings")["arm"].nunique()
    found = found[found["settings"].isin(arms[arms > 1].index)]
    orders = {"settings": found["settings"].unique(), "arm": list(ARMS.values()), "metric": list(FIGURES)}
    return found.assign(**{column: pd.Categorical(found[column], order) for column, order in orders.items()})


def figures_of(run: Run, keys: Sequence[str]) -> Iterator[tuple]:
    """The rows of one run, as `COLUMNS` names their values; a federation's first round measured the base model."""
    last, arm = run.metrics[-1] if run.metrics else {}, run.settings.get("baseline", "null")
    if run.status != COMPLETE or arm not in ARMS or "global" not in last.get("held_out", {}):
        return
    models = run.results["clients_used"] if arm == "alone" else 1
    effort = (Fraction(run.results["optimizer_steps"], models), Fraction(run.results["rows_trained"], models))
    scores = [(arm, last["held_out"]["global"], effort)]
    if arm == "null" and "global" in run.metrics[0].get("held_out_before", {}):
        scores.append(("base", run.metrics[0]["held_out_before"]["global"], (Fraction(0), Fraction(0))))
    for name, score, trained in scores:
        for metric in (metric for metric in FIGURES if metric in score):
            yield label(run, keys) or "all", ARMS[name], metric, score[metric], *trained


def for_people(table: pd.DataFrame) -> str:
    """A line for each setting and metric, a column for each arm: mean and, of several seeds, standard deviation."""
    facts = zip(table["mean"], table["deviation"], table["seeds"], strict=True)
    texts = [f"{mean:.3f} ± {deviation:.3f}" if seeds > 1 else f"{mean:.3f}" for mean, deviation, seeds in facts]
    wide = table.assign(text=texts).unstack("arm")
    shown = wide["text"].reindex(columns=ARMS.values(), fill_value="").fillna("")
    means = wide["mean"].reindex(columns=ARMS.values())
    ratios = means["federated"] / means["central"]
    shown["federated / central"] = [f"{ratio:.2f}" if math.isfinite(ratio) else "" for ratio in ratios]
    rows = ([setting, FIGURES[metric], *texts] for (setting, metric), *texts in shown.itertuples())
    return markdown(["", "", *shown.columns], rows)


def footnote(found: pd.DataFrame) -> str:
    """How much each model was trained; a warning if that is not the same for all."""
    trained = found[found["arm"] != ARMS["base"]]
    efforts = sorted(set(zip(trained["steps"], trained["rows"], strict=True)))
    if len(efforts) == 1:
        steps, rows = efforts[0]
        return f"Each model was trained for {steps} optimizer steps on {rows} rows, repetitions counted.\n"
    listed = ", ".join(f"{steps} and {rows}" for steps, rows in efforts)
    return f"Warning: the models were not trained equally: steps and rows of {listed}.\n"
