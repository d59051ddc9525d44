"""Figures from plain results. matplotlib is imported when the first one is drawn.

TensorBoard shows them some 320 pixels wide: one panel each, large letters. Colors are those of Okabe & Ito (2008),
distinct for color-blind readers: measured in vermilion, order 1 and the bands in blue, order 0 in gray dashes, what
follows from this network's own start in green, expansions about theta_0 in purple.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch_eft.results.presentation.figures import EXPANDED, GIVEN, MEASURED, THEORY, new_figure
from torch_eft.results.quantities import QUANTITIES
from torch_eft.results.tags import BAND, BAND_68, BAND_90, ERROR, EXPANSIONS, GIVEN_START, ORDERS, TRUNCATION, tag
from torch_eft.tensorboard.verdicts import verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

LINES = {
    "order_0": ("#555555", "--", 2.5, ORDERS["order_0"]),
    "order_1": (THEORY, "-", 2.5, ORDERS["order_1"]),
    GIVEN_START: (GIVEN, "--", 1.5, "median given this network's start"),
    "taylor_1": (EXPANDED, ":", 2.0, "expansion about theta_0, dNTK"),
    "taylor_2": (EXPANDED, "-", 2.0, "the same with ddNTK"),
}
REPLAYED = {
    "order_1": ("#555555", "--", 2.0, "Taylor model of order 1: frozen NTK"),
    "order_2": (EXPANDED, ":", 2.0, "order 2: with dNTK"),
    "order_3": (THEORY, "-", 2.5, "order 3: with ddNTK"),
}
"""Lines of steps taken again by Taylor models."""
MEDIAN = "median of networks, order 1/n"
SHADED = (
    (BAND, 0.2, "theory ± σ"),
    (BAND_90, 0.15, "90 % of networks"),
    (BAND_68, 0.25, "68 % of networks"),
    (TRUNCATION, 0.2, "order 3 ± its distance from order 2"),
    (ERROR, 0.25, "measured on random output directions, 68 %"),
)
History = Mapping[int, Mapping[str, float]]


def kernel_figure(H: "Tensor", title: str, limit: float | None = None) -> "Figure":
    """Draw a kernel matrix with its scale.

    Args:
        H: The kernel, (N, N).
        title: The title.
        limit: Colors run from -limit to limit, so that figures with one limit compare; None takes the largest entry.

    Returns:
        The figure.

    Example:
        >>> import torch
        >>> from torch_eft.tensorboard import kernel_figure
        >>> kernel_figure(torch.eye(3), "identity").axes[0].get_title()
        'identity'
    """
    drawing, (axes,) = new_figure()
    entries = H.detach().double().cpu().numpy()
    limit = limit or float(abs(entries).max()) or 1.0
    image = axes.imshow(entries, cmap="RdBu_r", vmin=-limit, vmax=limit)
    drawing.colorbar(image, ax=axes).ax.tick_params(labelsize=13)
    axes.set_title(title, fontsize=16)
    axes.set_xlabel("probe sample", fontsize=14)
    axes.set_ylabel("probe sample", fontsize=14)
    axes.tick_params(labelsize=13)
    return drawing


def draw_comparison(axes: "Axes", history: History, quantity: str) -> None:
    """Draw the measured line over the theory's orders and bands, for one quantity, the verdict under its title."""
    measured = _series(history, tag(quantity))
    for (low, high), alpha, label in SHADED:
        lower, upper = _series(history, tag(quantity, low)), _series(history, tag(quantity, high))
        if steps := [step for step in lower if step in upper]:
            edges = [lower[step] for step in steps], [upper[step] for step in steps]
            color = MEASURED if low == ERROR[0] else THEORY
            axes.fill_between(steps, *edges, color=color, alpha=alpha, lw=0, label=label)
    quantiles = bool(_series(history, tag(quantity, BAND_90[0])))
    replayed = quantity.startswith("replay_")
    for series, (color, style, width, label) in (REPLAYED if replayed else LINES).items():
        if quantiles and series in EXPANSIONS:  # along the path that this network took: for want of a forecast
            continue
        theory = _series(history, tag(quantity, series))
        if any(theory.values()) or (theory and series not in EXPANSIONS):  # not an expansion's start alone
            if series == "order_1" and quantiles:
                label = MEDIAN
            axes.plot(list(theory), list(theory.values()), color=color, ls=style, lw=width, label=label)
            if series in EXPANSIONS and max(theory) < max(measured, default=0):  # it ends where it holds no more
                axes.plot([max(theory)], [theory[max(theory)]], color=color, marker="X", ms=9, lw=0)
    if measured:  # errors of forecasts have orders alone
        axes.plot(list(measured), list(measured.values()), color=MEASURED, lw=2.5, marker="o", ms=4, label="measured")
    if (judged := verdict(history, quantity)) is not None and (judged.low is not None or judged.expansion):
        _subtitle(axes, judged.words)
    axes.set_title(QUANTITIES[quantity].title, fontsize=14, wrap=True, pad=6 if judged is None else 20)
    axes.set_xlabel("optimizer step", fontsize=14)
    axes.tick_params(labelsize=13)
    if max(history, default=0) >= 100:  # most of the motion is early
        axes.set_xscale("symlog", linthresh=1)
    if replayed and not measured and axes.lines:  # errors
        axes.axhline(1, color="#555555", lw=1, ls=(0, (5, 3)))
        axes.annotate("nothing predicted", (0.01, 1), xycoords=("axes fraction", "data"), va="top", fontsize=11)
        axes.set_yscale("log")
    axes.margins(x=0.01)
    axes.grid(alpha=0.2)


def comparison_figure(history: History, quantities: list[str], title: str = "") -> "Figure":
    """Draw measured against theory, one panel per quantity, three to a row.

    Args:
        history: ``{step: {tag: value}}``, as an observer or a monitor keeps it.
        quantities: Names out of ``QUANTITIES``.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        TypeError: If ``history`` is a ``Trajectory``.
        ValueError: If no quantity is given, or one is not registered.

    Example:
        >>> from torch_eft.tensorboard import comparison_figure, tag
        >>> history = {step: {tag("ntk_drift"): 0.01 * step} for step in range(3)}
        >>> len(comparison_figure(history, ["ntk_drift"]).axes)
        1
    """
    if not isinstance(history, Mapping):
        raise TypeError(
            f"history: {type(history).__name__} given; give {{step: {{tag: value}}}}, or draw trajectories with "
            "trajectory_figure"
        )
    if not quantities:
        raise ValueError("quantities: none given; give names out of QUANTITIES")
    columns = min(3, len(quantities))
    drawing, panels = new_figure(columns, -(-len(quantities) // columns))
    for axes, quantity in zip(panels, quantities, strict=False):
        draw_comparison(axes, history, quantity)
    for axes in panels[len(quantities) :]:
        axes.set_visible(False)
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(quantities) > 1 and named:  # one for all, beside the curves
        drawing.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=13, frameon=False)
    elif named:
        panels[0].legend(fontsize=13 if len(named) <= 4 else 10, framealpha=0.6, edgecolor="none")
    if title:
        drawing.suptitle(title, fontsize=14)
    return drawing


def layers_figure(
    histories: Mapping[str, Mapping[int, float]],
    title: str,
    theory: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
) -> "Figure":
    """Draw one line per hidden layer, from first (dark) to last (light), over what is predicted of it.

    Args:
        histories: ``{layer: {step: value}}``.
        title: The title.
        theory: ``{layer: {series: {step: value}}}``, as ``layer_theory`` returns it: dashed medians, and bands of 90 %.

    Returns:
        The figure.

    Example:
        >>> from torch_eft.tensorboard import layers_figure
        >>> len(layers_figure({"1": {0: 0.0, 5: 0.1}, "2": {0: 0.0, 5: 0.2}}, "change").axes[0].lines)
        2
    """
    from matplotlib import colormaps

    drawing, (axes,) = new_figure()
    shades, dashed = colormaps["viridis"], False
    for index, (layer, series) in enumerate(histories.items()):
        color = shades(0.85 * index / max(1, len(histories) - 1))
        predicted = (theory or {}).get(layer, {})
        low, high = (predicted.get(name, {}) for name in BAND_90)
        if steps := [step for step in sorted(low) if step in high]:
            edges = [low[step] for step in steps], [high[step] for step in steps]
            axes.fill_between(steps, *edges, color=color, alpha=0.15, lw=0)
        if median := dict(sorted(predicted.get("order_1", {}).items())):
            axes.plot(list(median), list(median.values()), color=color, lw=1.5, ls="--")
            dashed = True
        axes.plot(list(series), list(series.values()), color=color, lw=2, label=layer if len(histories) <= 8 else None)
    axes.set_title(title, fontsize=14, pad=20 if dashed else 6)
    if dashed:
        _subtitle(axes, "dashed and shaded: median and 90 % of networks")
    axes.set_xlabel("optimizer step", fontsize=14)
    axes.tick_params(labelsize=13)
    axes.margins(x=0.01)
    axes.grid(alpha=0.2)
    if 0 < len(histories) <= 8:
        axes.legend(title="layer", fontsize=11, frameon=False)
    return drawing


def _subtitle(axes: "Axes", words: str) -> None:
    axes.text(0.5, 1.015, words, transform=axes.transAxes, ha="center", fontsize=12, color="#555555")


def _series(history: History, name: str) -> dict[int, float]:
    return {step: values[name] for step, values in sorted(history.items()) if name in values}
