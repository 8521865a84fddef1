"""The pictures of a run, of several runs side by side, and of a federation beside its baselines."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import held_out_losses

# eight colours that colour-blind readers tell apart (Okabe and Ito, 2008; yellow darkened for white paper)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X", "*")


def smoothed(values: Sequence[float], weight: float | None = None) -> list[float]:
    """Exponential moving average without start-up bias, as TensorBoard draws it.

    Args:
        weight: of the past, in [0, 1). By default it averages over about a tenth of the values.
    """
    weight = max(0.0, 1 - 10 / max(len(values), 1)) if weight is None else weight
    average, curve = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        curve.append(average / (1 - weight**count))
    return curve


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the loss of each round, raw and smoothed, and that on held-out rows where it was measured, into a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rounds, losses = [line["round"] for line in metrics], [line["train_loss"] for line in metrics]
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(rounds, losses, color=COLOURS[0], alpha=0.35, linewidth=1, marker="o", markersize=3, label="training")
    axes.plot(rounds, smoothed(losses), color=COLOURS[0], linewidth=2, label="training, smoothed")
    if held_out := held_out_losses(metrics):
        axes.plot(list(held_out), list(held_out.values()), color=COLOURS[1], linewidth=2, marker="s", label="held out")
        best = min(held_out, key=held_out.__getitem__)
        label = f"{held_out[best]:.3f}"
        axes.annotate(
            label, (best, held_out[best]), (0, 7), textcoords="offset points", ha="left" if best == 0 else "center"
        )
    axes.set(title=title.replace("$", r"\$"), xlabel="Round", ylabel="Loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    tidy(axes)
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_comparison(curves: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Draw the losses of several runs into a PNG: smoothed curves, the raw ones faint behind.

    Args:
        curves: label and lines of metrics.jsonl of each run. The legend follows the curves' ends, highest first.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = []
    for label, metrics in curves:
        losses, rounds = [line["train_loss"] for line in metrics], [line["round"] for line in metrics]
        drawn.append((smoothed(losses), losses, rounds, label, held_out_losses(metrics)))
    drawn.sort(key=lambda curve: -curve[0][-1] if math.isfinite(curve[0][-1]) else -math.inf)
    panels = 1 + any(held_out for *_, held_out in drawn)
    figure = Figure(figsize=(9, 1.6 + 3.2 * panels), dpi=150, layout="constrained")
    axes = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
    for position, (curve, losses, rounds, label, held_out) in enumerate(drawn):
        look: dict[str, Any] = {
            "color": COLOURS[position % len(COLOURS)],
            "linestyle": STYLES[position // len(COLOURS) % len(STYLES)],
        }
        look |= {"linewidth": 1.8, "markersize": 4, "marker": MARKERS[position % len(MARKERS)]}
        text = "\n".join(textwrap.wrap(f"{label}: {curve[-1]:.3f}", 44)).replace("$", r"\$")
        axes[0].plot(rounds, losses, color=look["color"], alpha=0.2, linewidth=1)
        axes[0].plot(rounds, curve, **look, markevery=max(1, len(rounds) // 8), label=f" {text}")
        axes[-1].plot(list(held_out), list(held_out.values()), **look)
    for panel, name in zip(axes, ("Training loss, smoothed", "Held-out loss"), strict=False):
        panel.set(ylabel=name, ylim=(0, None))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(panel)
    axes[-1].set_xlabel("Round")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="run: last training loss")
    figure.savefig(path)


def tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_baselines(losses: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw bars of held-out losses into a PNG: a group for each setting, a bar for each arm, a dot for each seed.

    Args:
        losses: by setting and arm, the loss of each seed.
    """
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(arm for group in losses.values() for arm in group))
    figure = Figure(figsize=(3.4 + 2.6 * len(losses), 4.2), dpi=150, layout="constrained")
    axes, width = figure.subplots(), 0.8 / max(1, len(arms))
    for number, arm in enumerate(arms):
        places = [group + (number - (len(arms) - 1) / 2) * width for group in range(len(losses))]
        found = [list(group.get(arm, ())) for group in losses.values()]
        means = [statistics.mean(each) if each else 0.0 for each in found]
        axes.bar(places, means, 0.92 * width, color=COLOURS[number], alpha=0.85, label=arm)
        for place, each in zip(places, found, strict=True):
            axes.plot([place] * len(each), each, "o", color="black", markersize=3, alpha=0.7)
            if each:  # above bar and dots
                above = (place, max(each)), (0, 5)
                axes.annotate(f"{statistics.mean(each):.3f}", *above, textcoords="offset points", ha="center")
    axes.set(ylabel="Held-out loss (lower is better)")
    axes.margins(y=0.08)
    axes.set_xticks(range(len(losses)), ["\n".join(textwrap.wrap(name, 30)).replace("$", r"\$") for name in losses])
    tidy(axes)
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=max(1, len(arms)), frameon=False)
    figure.savefig(path)
