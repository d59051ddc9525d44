"""Pictures of a diagnosis: where a network stands in the phase plane and in the depth-width plane.

The diverging map (RdBu) and cividis can be distinguished by color-blind readers; borders carry labels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_eft.diagnosis.planes import DepthWidthPlane, PhasePlane
from torch_eft.results.presentation.figures import MEASURED, THEORY, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HERE: dict[str, Any] = dict(marker="*", ms=22, mfc="#F0E442", mec="black", mew=1.5, ls="none", zorder=6)
_DECADES = 4.0
"""Growth beyond which the color saturates."""
_REGIMES = (
    (0.01, "seeds alike", "#C8D6E5"),
    (0.2, "seeds differ\nlittle", "#7FA8C9"),
    (1.0, "much", "#E6A95C"),
    (float("inf"), "seeds differ\nby order one", "#A8481B"),
)


def planes_figure(phase: PhasePlane, shape: DepthWidthPlane) -> "Figure":
    """Return a figure of both planes with this network marked by a star.

    Args:
        phase: The phase plane.
        shape: The depth-width plane.
    """
    drawing, (left, right) = new_figure(columns=2)
    drawing.set_size_inches(12.4, 5.2)
    draw_phase_plane(left, phase)
    draw_depth_width(right, shape)
    drawing.suptitle(phase.title if len(phase.title) < 70 else f"{phase.title[:66]} ...", fontsize=15)
    return drawing


def draw_phase_plane(axes: "Axes", plane: PhasePlane) -> None:
    """Log10 of the growth of squared gradients, the line between order and chaos, the critical point, this network."""
    limit = min(_DECADES, max(1.0, float(plane.log_growth.abs().max())))
    growth = plane.log_growth.clamp(-limit, limit).numpy()
    image = axes.pcolormesh(
        plane.C_b.numpy(), plane.C_W.numpy(), growth, cmap="RdBu_r", vmin=-limit, vmax=limit, shading="gouraud"
    )
    bar = axes.figure.colorbar(image, ax=axes, extend="both")
    bar.set_label("log₁₀ squared gradient, layer 1 / L", fontsize=13)
    bar.ax.tick_params(labelsize=12)
    if len(plane.line):
        axes.plot(plane.line[:, 0].numpy(), plane.line[:, 1].numpy(), color="black", lw=2.5, ls="--", label="χ⊥ = 1")
    point = plane.critical
    if point is not None and point.C_b is not None and point.C_W is not None:
        axes.plot(
            [point.C_b], [point.C_W], marker="o", ms=12, mfc="white", mec="black", mew=2, ls="none", zorder=5,
            label="critical point", clip_on=False,
        )  # fmt: skip
    axes.plot([plane.network[0]], [plane.network[1]], label="this network", clip_on=False, **_HERE)
    axes.set_xlim(0.0, float(plane.C_b[-1]))
    axes.set_ylim(float(plane.C_W[0]), float(plane.C_W[-1]))
    style: dict[str, Any] = dict(transform=axes.transAxes, fontsize=14, color="black", weight="bold")
    box: dict[str, Any] = dict(facecolor="white", alpha=0.75, edgecolor="none", pad=2)
    axes.text(0.03, 0.95, "chaos: gradients explode", va="top", ha="left", bbox=box, **style)
    axes.text(0.97, 0.05, "order: gradients vanish", va="bottom", ha="right", bbox=box, **style)
    axes.set_xlabel("bias variance $C_b$", fontsize=14)
    axes.set_ylabel("weight variance · fan-in, $C_W$", fontsize=14)
    axes.set_title(f"gradients over {plane.depth} layers", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.legend(fontsize=12, loc="center right", framealpha=0.85)


def draw_depth_width(axes: "Axes", plane: DepthWidthPlane) -> None:
    """How much seeds differ, by epsilon, and this network."""
    depths = [float(depth) for depth in plane.depths]
    low = min(8.0, plane.width / 3)
    high = max(4096.0, 3 * plane.width)
    edges = [low] * len(depths)
    before = edges
    for limit, name, color in reversed(_REGIMES):
        if limit == float("inf"):
            after = [min(high, max(low, size / 1.0)) for size in plane.size]
        else:
            index = [one[0] for one in _REGIMES].index(limit)
            below = _REGIMES[index - 1][0] if index else None
            after = [high if below is None else min(high, max(low, size / below)) for size in plane.size]
        axes.fill_betweenx(depths, before, after, color=color, lw=0)
        _name_regime(axes, depths, before, after, name, "white" if limit == float("inf") else "black")
        before = after
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.plot([plane.width], [plane.depth], **_HERE)
    axes.set_xlim(low, high)
    axes.set_ylim(depths[0], depths[-1])
    axes.set_xlabel("hidden width n", fontsize=14)
    axes.set_ylabel("depth L", fontsize=14)
    axes.set_title(f"output variance, seed to seed: ε = {plane.epsilon:.2g}, r = {plane.r:.2g}", fontsize=14)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.tick_params(labelsize=12)


def _name_regime(
    axes: "Axes", depths: list[float], before: list[float], after: list[float], name: str, color: str
) -> None:
    """Where the regime is widest, in its middle, if it is wide enough for its name."""
    octaves = [math.log2(b / a) for a, b in zip(before, after, strict=True)]
    inner = [row for row, depth in enumerate(depths) if 3 <= depth <= 0.75 * depths[-1]]
    widest = max((octaves[row] for row in inner), default=0.0)
    if widest < 1.5:
        return
    close = [row for row in inner if octaves[row] > 0.95 * widest]
    row = close[len(close) // 2]
    at_edge = after[row] == max(after)
    x = after[row] / 1.08 if at_edge else math.sqrt(before[row] * after[row])
    axes.text(x, depths[row], name, ha="right" if at_edge else "center", va="center", fontsize=13, color=color,
              weight="bold")  # fmt: skip


def measured_figure(
    title: str,
    places: Sequence[str],
    gradients: Sequence[float],
    variances: Sequence[float],
    shares: Mapping[str, float],
    how: str = "measured",
) -> "Figure":
    """Signals and squared gradients at bottlenecks or layers, and the NTK's shares by layer.

    Args:
        title: Of the figure.
        places: Names of the bottlenecks.
        gradients: Squared gradients there.
        variances: Mean squares of the features there.
        shares: Parts of the NTK's trace, by layer.
        how: ``"measured"`` or ``"derived"``.

    Returns:
        The figure.
    """
    drawing, (left, right) = new_figure(columns=2)
    drawing.set_size_inches(12.4, 5.2)
    x = range(len(places))
    left.semilogy(x, gradients, "o-", color=MEASURED, lw=2, label="squared gradient J")
    left.semilogy(x, variances, "s--", color=THEORY, lw=2, label="mean square of features")
    left.set_xticks(list(x), list(places), rotation=60, ha="right", fontsize=11)
    left.set_title(f"{how} along the depth", fontsize=14)
    left.legend(fontsize=12, frameon=False)
    left.grid(alpha=0.3)
    right.barh([name or "(top)" for name in shares], [100 * share for share in shares.values()], color=THEORY)
    right.invert_yaxis()
    right.set_xlabel("% of the NTK's trace", fontsize=13)
    right.set_title(f"{how} NTK share by layer", fontsize=14)
    for axes in (left, right):
        axes.tick_params(labelsize=11)
    drawing.suptitle(title, fontsize=15)
    return drawing
