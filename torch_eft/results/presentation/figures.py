"""An empty figure for results to draw themselves on. matplotlib is imported when the first one is drawn."""

import functools
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURED, THEORY, GIVEN, EXPANDED = "#D55E00", "#0072B2", "#009E73", "#8A3A80"
"""Of Okabe & Ito (2008), distinct for color-blind readers."""


def new_figure(columns: int = 1, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """Return an empty figure that belongs to no window, sized to stay readable as a thumbnail, and its panels.

    Args:
        columns: Panels side by side.
        rows: Panels above each other.

    Returns:
        The figure, which a notebook shows, and its axes.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'torch-eft[demo]'") from error
    # matplotlib's own layout takes twice as long as the drawing itself: one panel does without.
    several = rows * columns > 1
    drawing = _shown_by_notebooks(Figure)(
        figsize=(5.6 * columns, 4.2 * rows), layout="constrained" if several else None
    )
    FigureCanvasAgg(drawing)
    if not several:
        drawing.subplots_adjust(left=0.17, right=0.96, bottom=0.16, top=0.87)
    return drawing, [drawing.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]


@functools.cache
def _shown_by_notebooks(base: Any) -> Any:
    class Drawing(base):
        """A figure that notebooks show, though pyplot does not know of it."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=100)
            return buffer.getvalue()

    return Drawing


def label_steps(axes: "Axes", title: str) -> None:
    """Give a panel over optimizer steps its title, letters and grid."""
    axes.set_title(title, fontsize=14)
    axes.set_xlabel("optimizer step", fontsize=14)
    axes.tick_params(labelsize=13)
    axes.grid(alpha=0.2)
