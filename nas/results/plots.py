"""Pictures: the front of a run, a schedule, a grid of samples. Each returns or writes a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nas.contracts import SAMPLER, Trial
from nas.results.report import Scale
from nas.results.trials import against, full_network, verified_front

INK = "#0a0b0c"
"""What is neither data nor ground; a page that shows a picture replaces it by its own ink."""

mpl.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "savefig.dpi": 150,
        "svg.fonttype": "none",
        "svg.hashsalt": "pictures",
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
        ),
    }
)

_COLOURS = ("#1f6f8b", "#c8553d", "#5b8c5a", "#8d6a9f", "#d19c1d", "#4a4a4a")
_FORMS = (("o", 7, "-"), ("^", 5, "--"), ("D", 3, "-."), ("v", 5, (0, (5, 1, 1, 1))))
"""Marker, its size, and line, by which fronts are told apart where they are the same."""

_BASELINE_COLOUR = "#9a9a9a"


LABELLED = 12
"""Intervals whose timesteps are told below a picture, at most."""


def draw_front(
    ledgers: Mapping[str, Sequence[Trial]], facts: Mapping[str, Any], scale: Scale, label: str, path: Path, best: str
) -> None:
    """The verified trials of each searcher over their share of the scale's cost, their front with error bars, the uniform schedules,
    and below it which option each member of one front runs at which interval.

    `facts` is what `study.json` holds; `label` names the measured objective; `best`: whose front is the best (`best_searcher`).
    """
    objectives, baseline = facts["objectives"], facts["baseline"]
    figure = Figure(figsize=(7.5, 7.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    _draw_scores(top, ledgers, facts, scale)
    top.set_ylabel(
        fill(label, 52)
        + "\n(lower is better; bars: ± 1 standard error;\nhollow: not told apart from the next cheaper)",
        fontsize=9,
    )
    if best == baseline:
        bottom.set_axis_off()
    else:
        front = verified_front(ledgers[best], objectives)
        _draw_schedules(figure, bottom, front, facts["choices"], scale, facts.get("spans", ()))
        bottom.set_title(f"which option runs when, for the front of {best}", fontsize=10)
    _save(figure, path)


def draw_curves(rows: Sequence[Mapping[str, Any]], until: float, path: Path) -> None:
    """Hypervolume over the MACs spent, a line for each searcher: the mean over its seeds, with their range. `rows` are those of
    `Run.compare`; `until`: MACs that all have spent, dotted."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[Sequence[tuple[float, float]]]] = {}
    for row in rows:
        if row["curve"] and not row["baseline"]:
            groups.setdefault(row["searcher"].partition(" (seed")[0], []).append(row["curve"])
    for number, (name, curves) in enumerate(groups.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = ("-", "--")[number // len(_COLOURS) % 2]
        most = min(curve[-1][0] for curve in curves)
        at = np.linspace(0, most, 300)
        heights = np.array([_height(curve, at) for curve in curves])
        axes.step(at, heights.mean(0), where="post", label=name, color=colour, linestyle=line)
        if len(curves) > 1:
            axes.fill_between(at, heights.min(0), heights.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.axvline(until, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("MACs spent" + (", mean and range over seeds" if any(len(c) > 1 for c in groups.values()) else ""))
    axes.set_ylabel("hypervolume on search samples")
    if groups:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    _save(figure, path)


def draw_scores(
    ledgers: Mapping[str, Sequence[Trial]], facts: Mapping[str, Any], scale: Scale, label: str, path: Path
) -> None:
    """The upper half of `draw_front` alone."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    _draw_scores(axes, ledgers, facts, scale)
    axes.set_ylabel(label)
    _save(figure, path)


def draw_losses(rows: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses over the steps of each network's training, smoothed over a fiftieth of them; and the schedule's scores on the way, one network
    after another. `rows`: "model", "step", "loss"; `scores`: "model", "step", the score by its name, and its "error"."""
    figure = Figure(figsize=(11 if scores else 7.5, 4), layout="constrained")
    axes, *others = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        losses = np.array([row["loss"] for row in rows if row["model"] == name])
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(len(smooth)) + width, smooth, color=_COLOURS[number % len(_COLOURS)], label=name)
    axes.set_xlabel("gradient step")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    for right in others:
        [quality] = set(scores[0]) - {"model", "step", "error"}
        places = range(len(scores))
        values, errors = ([score[name] for score in scores] for name in (quality, "error"))
        right.errorbar(places, values, yerr=errors, fmt="o-", color=_COLOURS[0], capsize=3)
        words = [f"{score['model']}: {score['step']}" if score["model"] else "as exported" for score in scores]
        right.set_xticks(places, words, rotation=90, fontsize=7)
        right.set_xlabel("network and gradient step")
        right.set_ylabel(quality)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """By its suffix; an SVG has no ground of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=path.suffix == ".svg", metadata={"Date": None} if path.suffix == ".svg" else None)


def _height(curve: Sequence[tuple[float, float]], at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A step curve's value at each place; 0 before its first point."""
    spent, heights = np.array(curve).T
    return np.append(0.0, heights)[np.searchsorted(spent, at, side="right")]


def draw_audit(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> None:
    """Each proxy's agreement with the reference inside bands of equal MACs, with its cost, and the best one's scores beside the
    reference's."""
    rows, proxies = [row for row in rows if row["scores"]], facts["proxies"]
    figure = Figure(figsize=(11, 2.2 + max(2.4, 0.27 * len(proxies))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    places = list(range(len(proxies)))[::-1]
    taus = [proxy["tau_in_band"] for proxy in proxies]
    lows, highs = zip(*(proxy["tau_in_band_interval"] for proxy in proxies), strict=True)
    errors = [[t - low for t, low in zip(taus, lows, strict=True)], [h - t for t, h in zip(taus, highs, strict=True)]]
    left.errorbar(taus, places, xerr=errors, fmt="o", color=_COLOURS[0], capsize=3)
    left.set_yticks(places, [f"{proxy['proxy']}  ({proxy['macs_share']:.1%})" for proxy in proxies])
    left.axvline(0, color=_BASELINE_COLOUR, linewidth=0.8)
    left.axvline(facts["test_retest"]["tau_in_band"], color=_BASELINE_COLOUR, linestyle=":")
    left.set_xlim(min(-0.05, *lows), 1)
    left.set_title("dotted: the reference with itself; in brackets: MACs, of the reference's", fontsize=9, loc="right")
    left.set_xlabel("Kendall's tau inside bands of equal MACs (bars: 95 % over schedules)")
    best = proxies[0]["proxy"]
    shares = [row["cost"]["macs_share"] for row in rows]
    x, y = ([next(iter(row["scores"][name]["values"].values())) for row in rows] for name in (best, "reference"))
    points = right.scatter(x, y, c=shares, cmap="viridis", s=14, alpha=0.8)
    right.set_xlabel(best)
    right.set_ylabel(facts["reference"])
    figure.colorbar(points, ax=right, label="share of the full network's MACs")
    _save(figure, path)


def draw_intervals(facts: Mapping[str, Any], path: Path) -> None:
    """The affinity of gradients over the training timesteps with the boundaries that follow from it, what a smaller net changes at each
    step, and how each maker divides the timesteps."""
    total = facts["points"][-1]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.05])
    image = left.imshow(
        facts["affinity"],
        origin="lower",
        extent=(0, total, 0, total),
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
    )
    for boundary in facts["boundaries"]["gradients"]:
        for line in (left.axvline, left.axhline):
            line(boundary, color=INK, linewidth=1.2)
    left.set_xlabel("training timestep (0: clean)")
    left.set_ylabel("training timestep")
    left.set_title("cosine of the full network's gradients", fontsize=10)
    figure.colorbar(image, ax=left, shrink=0.75)
    right.set_axis_off()
    top, bottom = right.inset_axes((0.18, 0.55, 0.82, 0.42)), right.inset_axes((0.18, 0.02, 0.82, 0.36))
    effects, errors = np.array(facts["effects"]), np.array(facts["effect_errors"])
    for option in range(effects.shape[1] - 1):
        top.errorbar(
            facts["timesteps"],
            effects[:, option],
            yerr=errors[:, option],
            fmt="o-",
            markersize=3,
            capsize=2,
            color=_COLOURS[option % len(_COLOURS)],
            label=f"width {facts['widths'][option]:g}",
        )
    top.axhline(0, color=_BASELINE_COLOUR, linewidth=0.8)
    top.set_xlim(-10, total + 10)
    top.legend(frameon=False, fontsize=8)
    top.set_title(f"change in {facts['metric']} where one step alone runs a smaller net", fontsize=10)
    names = list(facts["boundaries"])
    for place, name in enumerate(names):
        ends = [0, *facts["boundaries"][name], total]
        for number, (start, stop) in enumerate(pairwise(ends)):
            bottom.barh(place, stop - start, left=start, height=0.7, color=_COLOURS[number % len(_COLOURS)], alpha=0.55)
    for timestep in facts["timesteps"]:
        bottom.axvline(timestep, color=INK, linewidth=0.5, linestyle=":")
    bottom.set_yticks(range(len(names)), names)
    bottom.invert_yaxis()
    bottom.set_xlim(-10, total + 10)
    bottom.set_xlabel("training timestep (dotted: the sampler's steps)")
    _save(figure, path)


def _draw_scores(axes: Axes, ledgers: Mapping[str, Sequence[Trial]], facts: Mapping[str, Any], scale: Scale) -> None:
    objectives, baseline = facts["objectives"], facts["baseline"]
    quality = objectives[0]
    colours, forms = iter(_COLOURS * len(ledgers)), iter(_FORMS * len(ledgers))
    for name, trials in ledgers.items():
        done = sorted((t for t in trials if t.status == "complete"), key=scale.share)
        if not done:
            continue
        x, y, error = _points(done, quality, scale)
        if name == baseline:
            axes.errorbar(
                x,
                y,
                yerr=error,
                fmt="s--",
                color=_BASELINE_COLOUR,
                capsize=3,
                label="one option for all steps",
                zorder=2,
            )
            if (full := full_network(trials, quality)) is not None:
                [height] = full.objectives((quality,))
                axes.axhline(height, color=_BASELINE_COLOUR, linewidth=0.8, linestyle=":", zorder=1)
                axes.annotate("full network", (1, height), (0, -14), textcoords="offset points", ha="right", fontsize=9)
            continue
        colour, (marker, size, line) = next(colours), next(forms)
        axes.plot(x, y, marker, color=colour, alpha=0.25, markersize=4)
        verified = sorted(verified_front(trials, objectives), key=scale.share)
        front = _falling(verified, quality)
        others = [trial for trial in verified if trial not in front]
        if others:
            x, y, error = _points(others, quality, scale)
            words = f"{name}: on the front by another score"
            axes.errorbar(x, y, yerr=error, fmt="x", color=colour, capsize=3, markersize=5, label=words, zorder=3)
        x, y, error = _points(front, quality, scale)
        axes.errorbar(
            x,
            y,
            yerr=error,
            marker=marker,
            linestyle=line,
            color=colour,
            capsize=3,
            markersize=size,
            label=f"{name}: verified front",
            zorder=3,
        )
        compared = [against(trial, cheaper, quality) for cheaper, trial in pairwise(front)]
        ties = [i for i, found in enumerate(compared, 1) if found and not found["conclusive"]]
        axes.plot([x[i] for i in ties], [y[i] for i in ties], marker, color="white", markersize=size / 2, zorder=4)
    axes.set_xlim(0, 1.03)
    axes.set_xlabel(f"share of the full network's {scale.words}")
    if scale.limit is not None:
        axes.axvline(scale.limit, color=INK, linewidth=0.8, linestyle="-.")
        axes.annotate(
            "limit",
            (scale.limit, 0),
            (3, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=9,
        )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8
        )  # above: nothing is under it


def _falling(trials: Sequence[Trial], quality: str) -> list[Trial]:
    """Of trials from the cheapest to the dearest those that no cheaper one equals in this score: where there are further objectives, others are on
    the front by these."""
    found: list[Trial] = []
    least = math.inf
    for trial in trials:
        assert trial.score is not None
        if trial.score.values[quality] < least:
            found.append(trial)
            least = trial.score.values[quality]
    return found


def _draw_schedules(
    figure: Figure,
    axes: Axes,
    trials: Sequence[Trial],
    choices: Sequence[Any],
    scale: Scale,
    spans: Sequence[Sequence[int]],
) -> None:
    """`spans`: first and last timestep of each interval, where the space knows them."""
    options = [option for _, option in choices]
    alike = all(option == options[0] for option in options) and len(options[0]) <= 8
    genes = np.array([trial.genome for trial in trials], dtype=float)
    if not alike:
        genes /= np.maximum([len(option) - 1 for option in options], 1)
    highest = max(map(len, options)) - 1 if alike else 1
    image = axes.imshow(genes, aspect="auto", cmap="YlGnBu", vmin=0, vmax=highest, interpolation="nearest")
    axes.set_yticks(range(len(trials)), [f"#{t.number}  {scale.share(t):.2f}" for t in trials])
    axes.set_ylabel(f"trial, share of {scale.words}")
    homes = [name.rpartition(".")[0] or name for name, _ in choices]
    several = len(set(homes)) < len(choices)
    if several:
        axes.set_xlabel("choices of each interval, noisy to clean")
        axes.set_xticks(range(len(choices)), [name.rpartition(".")[2] for name, _ in choices], rotation=90, fontsize=7)
        for place, (before, here) in enumerate(pairwise(homes)):
            if before != here:
                axes.axvline(place + 0.5, color=INK, linewidth=0.8)
    else:
        axes.set_xlabel("interval, noisy to clean")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    intervals = [home for home in dict.fromkeys(homes) if home != SAMPLER]
    if len(spans) == len(intervals):
        middles = [float(np.mean([n for n, home in enumerate(homes) if home == one])) for one in intervals]
        words = [f"{first}" if first == last else f"{first}\nto {last}" for first, last in spans]
        shown = np.unique(np.linspace(0, len(spans) - 1, min(len(spans), LABELLED)).round().astype(int))
        under = axes.secondary_xaxis(-0.36 if several else 0.0)
        under.set_xticks([middles[n] for n in shown], [words[n] for n in shown], fontsize=8)
        under.tick_params(length=0)
        under.spines[:].set_visible(False)
        axes.set_xlabel("")
        under.set_xlabel("timesteps of each interval, noisy to clean")
        if not several:
            axes.set_xticks([])
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, ticks=range(len(options[0])) if alike else [0, 1])
    bar.set_ticklabels([str(option) for option in options[0]] if alike else ["least", "most"])
    bar.set_label(choices[0][0].rpartition(".")[2] if alike else "option")


def _points(trials: Sequence[Trial], quality: str, scale: Scale) -> tuple[list[float], list[float], list[float]]:
    scores = [trial.score for trial in trials if trial.score is not None]
    x = [scale.share(trial) for trial in trials]
    return x, [score.values[quality] for score in scores], [score.error(quality) for score in scores]
