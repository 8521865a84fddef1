"""The pictures of a run, of several runs side by side, and of a federation beside its baselines."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from cycler import cycler

from utils import held_out_losses

# eight colours that colour-blind readers tell apart (Okabe and Ito, 2008; yellow darkened for white paper)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
CURVES = cycler(linestyle=["-", "--", ":", "-."]) * (cycler(color=COLOURS) + cycler(marker=list("os^DvPX*")))


def smoothed(values: Sequence[float], weight: float | None = None) -> list[float]:
    """Exponential moving average without start-up bias, as TensorBoard draws it; NaN stays NaN.

    The `weight` of the past is in [0, 1); by default, it averages over about a tenth of the values.
    """
    weight = max(0.0, 1 - 10 / max(len(values), 1)) if weight is None else weight
    series = pd.Series(values, dtype=float)
    return series.ewm(alpha=1 - weight).mean().where(series.notna()).tolist()


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the loss of each round, raw and smoothed, and that on held-out rows where it was measured, into a PNG."""
    rounds, losses = [line["round"] for line in metrics], [line["train_loss"] for line in metrics]
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    axes.plot(rounds, losses, color=COLOURS[0], alpha=0.35, linewidth=1, marker="o", markersize=3, label="training")
    axes.plot(rounds, smoothed(losses), color=COLOURS[0], linewidth=2, label="training, smoothed")
    if held_out := held_out_losses(metrics):
        axes.plot(list(held_out), list(held_out.values()), color=COLOURS[1], linewidth=2, marker="s", label="held out")
        best = min(held_out, key=held_out.__getitem__)
        above(axes, best, held_out[best], f"{held_out[best]:.3f}", ha="left" if best == 0 else "center")
    axes.set_title(wrapped(title))
    by_round([axes], ["Loss"])
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_comparison(curves: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Draw the losses of several runs into a PNG: smoothed curves, the raw ones faint behind.

    The legend, of each run's label, follows the curves' ends, highest first.
    """
    drawn = [(smoothed([line["train_loss"] for line in metrics]), label, metrics) for label, metrics in curves]
    drawn.sort(key=lambda run: -run[0][-1] if math.isfinite(run[0][-1]) else -math.inf)
    panels = 1 + any(held_out_losses(metrics) for *_, metrics in drawn)
    figure = new_figure(9, 1.6 + 3.2 * panels)
    axes = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
    for (curve, label, metrics), look in zip(drawn, CURVES(), strict=False):
        look |= {"linewidth": 1.8, "markersize": 4}
        rounds, losses = [line["round"] for line in metrics], [line["train_loss"] for line in metrics]
        axes[0].plot(rounds, losses, color=look["color"], alpha=0.2, linewidth=1)
        text = wrapped(f"{label}: {curve[-1]:.3f}", 44)
        axes[0].plot(rounds, curve, **look, markevery=max(1, len(rounds) // 8), label=f" {text}")
        held_out = held_out_losses(metrics)
        axes[-1].plot(list(held_out), list(held_out.values()), **look)
    by_round(axes, ["Training loss, smoothed", "Held-out loss"])
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="run: last training loss")
    figure.savefig(path)


def plot_baselines(losses: pd.DataFrame, path: Path) -> None:
    """Draw bars of held-out losses into a PNG: a group for each setting, a bar for each arm, a dot for each seed.

    There is a row for each seed, with columns settings, arm, value.
    """
    settings, arms = list(losses["settings"].unique()), losses["arm"].cat.remove_unused_categories().cat.categories
    figure, width = new_figure(3.4 + 2.6 * len(settings), 4.2), 0.8 / max(1, len(arms))
    axes = figure.subplots()
    for number, arm in enumerate(arms):
        shift = (number - (len(arms) - 1) / 2) * width
        bars = losses[losses["arm"] == arm].groupby("settings", observed=True)["value"]
        places = [settings.index(name) + shift for name in bars.groups]
        axes.bar(places, bars.mean(), 0.92 * width, color=COLOURS[number], alpha=0.85, label=arm)
        for place, (_, values) in zip(places, bars, strict=True):
            axes.plot([place] * len(values), values, "o", color="black", markersize=3, alpha=0.7)
            above(axes, place, values.max(), f"{values.mean():.3f}")
    axes.set(ylabel="Held-out loss (lower is better)")
    axes.margins(y=0.08)
    axes.set_xticks(range(len(settings)), [wrapped(name, 30) for name in settings])
    tidy(axes)
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=max(1, len(arms)), frameon=False)
    figure.savefig(path)


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not before something is drawn: it takes a moment

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def by_round(panels: Sequence[Any], names: Sequence[str]) -> None:
    """Panels of losses, one above the other: whole rounds below, losses from 0."""
    for axes, name in zip(panels, names, strict=False):
        axes.set(ylabel=name, ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
        tidy(axes)
    panels[-1].set_xlabel("Round")


def tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def above(axes: Any, x: float, y: float, text: str, ha: str = "center") -> None:
    axes.annotate(text, (x, y), (0, 6), textcoords="offset points", ha=ha)


def wrapped(text: str, width: int = 100) -> str:
    """Lines of at most `width` characters, in which a dollar sign begins no formula."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")
