"""Figures from plain results. matplotlib is imported when the first one is drawn.

TensorBoard shows them some 320 pixels wide: one panel each, large letters. Colors are those of Okabe & Ito (2008),
distinct for color-blind readers: measured in vermilion, order 1 and the band in blue, order 0 in gray dashes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch_eft.results.quantities import QUANTITIES
from torch_eft.results.tags import BAND, ORDERS, tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

MEASURED, THEORY = "#D55E00", "#0072B2"
LINES = {"order_0": ("#555555", "--"), "order_1": (THEORY, "-")}
History = Mapping[int, Mapping[str, float]]


def figure(columns: int = 1, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """An empty figure that belongs to no window, sized to stay readable as a thumbnail."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # matplotlib's own layout takes twice as long as the drawing itself: one panel does without.
    several = rows * columns > 1
    drawing = Figure(figsize=(5.6 * columns, 4.2 * rows), layout="constrained" if several else None)
    FigureCanvasAgg(drawing)
    if not several:
        drawing.subplots_adjust(left=0.17, right=0.96, bottom=0.16, top=0.88)
    axes = [drawing.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]
    return drawing, axes


def kernel_figure(H: "Tensor", title: str, limit: float | None = None) -> "Figure":
    """A kernel matrix (N, N) with its scale.

    Args:
        H: The kernel.
        title: The title.
        limit: Colors run from -limit to limit, so that figures with one limit compare; None takes the largest entry.
    """
    drawing, (axes,) = figure()
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
    """Measured line over the theory's orders and band, for one quantity."""
    measured = _series(history, tag(quantity))
    lower, upper = (_series(history, tag(quantity, series)) for series in BAND)
    if lower:
        axes.fill_between(
            list(lower), list(lower.values()), list(upper.values()), color=THEORY, alpha=0.2, lw=0, label="theory ± σ"
        )
    for order, label in ORDERS.items():
        if theory := _series(history, tag(quantity, order)):
            color, style = LINES[order]
            axes.plot(list(theory), list(theory.values()), color=color, ls=style, lw=2.5, label=label)
    if measured:  # errors of forecasts have orders alone
        axes.plot(list(measured), list(measured.values()), color=MEASURED, lw=2.5, label="measured")
    axes.set_title(QUANTITIES[quantity].title, fontsize=14, wrap=True)
    axes.set_xlabel("optimizer step", fontsize=14)
    axes.tick_params(labelsize=13)
    if max(history, default=0) >= 100:  # most of the motion is early
        axes.set_xscale("symlog", linthresh=1)
    axes.margins(x=0.01)
    axes.legend(fontsize=13, frameon=False)
    axes.grid(alpha=0.2)


def comparison_figure(history: History, quantities: list[str], title: str = "") -> "Figure":
    """One panel a quantity, three to a row."""
    columns = min(3, len(quantities))
    drawing, panels = figure(columns, -(-len(quantities) // columns))
    for axes, quantity in zip(panels, quantities, strict=False):
        draw_comparison(axes, history, quantity)
    for axes in panels[len(quantities) :]:
        axes.set_visible(False)
    if title:
        drawing.suptitle(title, fontsize=14)
    return drawing


def layers_figure(histories: Mapping[str, Mapping[int, float]], title: str) -> "Figure":
    """One line a hidden layer, from first (dark) to last (light)."""
    from matplotlib import colormaps

    drawing, (axes,) = figure()
    shades = colormaps["viridis"]
    for index, (layer, series) in enumerate(histories.items()):
        color = shades(0.85 * index / max(1, len(histories) - 1))
        axes.plot(list(series), list(series.values()), color=color, lw=2, label=layer if len(histories) <= 8 else None)
    axes.set_title(title, fontsize=14)
    axes.set_xlabel("optimizer step", fontsize=14)
    axes.tick_params(labelsize=13)
    axes.margins(x=0.01)
    axes.grid(alpha=0.2)
    if len(histories) <= 8:
        axes.legend(title="layer", fontsize=11, frameon=False)
    return drawing


def _series(history: History, name: str) -> dict[int, float]:
    return {step: values[name] for step, values in sorted(history.items()) if name in values}
