"""Pictures of the page as SVG: the same bytes from the same numbers, a light ground of their own
so that they can be read on a dark page too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot, rcParams

pyplot.switch_backend("svg")
rcParams |= {
    "svg.hashsalt": "myelin",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "#ffffff",
    "axes.facecolor": "#ffffff",
    "text.color": "#1f2328",
    "axes.labelcolor": "#1f2328",
    "xtick.color": "#1f2328",
    "ytick.color": "#1f2328",
}

OURS, OURS_LIGHT, PEER, PEER_LIGHT, DARK = "#0b6e4f", "#8fc9b0", "#3d6fb6", "#a9c3e8", "#8a8f98"


def throughput(models: Mapping[str, Mapping[str, float]], folder: Path) -> Path:
    """Bars of examples a second, each model's first bar being 1."""
    colours = [PEER, PEER_LIGHT, DARK, OURS_LIGHT, OURS]
    figure, axes = _axes(1, 1.55 * len(models) + 0.8)
    ticks = []
    for number, (model, bars) in enumerate(models.items()):
        base = next(iter(bars.values()))
        at = [number * (len(bars) + 1) + i for i in range(len(bars))]
        ticks.append((sum(at) / len(at), model))
        for y, (name, value), colour in zip(at, bars.items(), colours, strict=True):
            axes[0].barh(y, value / base, color=colour, label=None if number else name)
            axes[0].text(value / base, y, f" {value / base:.2f}× · {value:,.0f}/s", va="center")
    axes[0].set_yticks(*zip(*ticks, strict=True))
    axes[0].invert_yaxis()
    axes[0].set_xlabel("examples per second ÷ PyTorch float32, not private, at its best")
    axes[0].margins(x=0.25)
    figure.legend(loc="outside upper left", frameon=False, ncols=3)
    return _save(figure, folder, "throughput")


def layers(models: Mapping[str, Mapping[str, tuple[float, float]]], folder: Path) -> Path:
    """For each model, a pair of bars a layer, without and with privacy, in milliseconds."""
    shown = {
        model: sorted(found.items(), key=lambda item: -max(item[1]))[:12]
        for model, found in models.items()
    }
    heights = [len(found) + 2 for found in shown.values()]
    figure, axes = _axes(len(shown), 0.36 * sum(heights) + 0.6, ratios=heights)
    for number, (panel, (model, found)) in enumerate(zip(axes, shown.items(), strict=True)):
        for side, (name, colour) in enumerate((("not private", OURS_LIGHT), ("private", OURS))):
            at = [i + 0.4 * side - 0.2 for i in range(len(found))]
            values = [pair[side] for _, pair in found]
            panel.barh(at, values, 0.4, color=colour, label=name)
        panel.set_yticks(range(len(found)), [layer or "loss, factors" for layer, _ in found])
        panel.invert_yaxis()
        left_out = len(models[model]) - len(found)
        more = f", without {left_out} cheaper layers" if left_out else ""
        panel.set_title(f"{model}, ms of a layer's kernels{more}", loc="left", fontsize=10)
        if number == 0:
            panel.legend(loc="lower right", frameon=False)
    return _save(figure, folder, "layers")


def scaling(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], folder: Path) -> Path:
    """A line of (xs, ys) a panel, xs by powers of two."""
    figure, axes = _axes(len(panels), 2.7 * -(-len(panels) // 2), across=2)
    for panel, (title, (xs, ys)) in zip(axes, panels.items(), strict=True):
        panel.plot(xs, ys, "o-", color=OURS)
        panel.set_xscale("log", base=2)
        panel.set_xticks(xs, [f"{x:g}" for x in xs])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_title(title, loc="left", fontsize=10)
        panel.grid(color="#d8dce2")
    return _save(figure, folder, "scaling")


def losses(models: Mapping[str, Mapping[str, Sequence[float]]], folder: Path) -> Path:
    """Loss curves, a panel a model."""
    figure, axes = _axes(len(models), 2.9, across=len(models))
    for panel, (model, curves) in zip(axes, models.items(), strict=True):
        styles = [(OURS, "-"), (PEER, "--"), (DARK, ":"), (OURS, ":"), (PEER, ":")]
        for (name, values), (colour, style) in zip(curves.items(), styles, strict=False):
            panel.plot(values, style, color=colour, label=name, linewidth=1.2)
        panel.set_title(f"{model}: loss of each step's batch", loc="left", fontsize=10)
        panel.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    return _save(figure, folder, "losses")


def _axes(
    count: int, height: float, *, across: int = 1, ratios: Sequence[float] | None = None
) -> tuple[Any, list[Any]]:
    figure, axes = pyplot.subplots(
        -(-count // across),
        across,
        figsize=(9, height),
        squeeze=False,
        layout="constrained",
        height_ratios=ratios,
    )
    return figure, list(axes.flat)


def _save(figure: Any, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
