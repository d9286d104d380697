"""Labels of points that do not lie on one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""

SIZE = 8
RADIUS = 6.0
"""Half of a marker, in pixels at 100 dots per inch."""


def label_points(panel: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a text beside each point, where it covers neither a point nor another text.

    A text that has to move away has a thin line to its point. One that fits nowhere is left out.

    Args:
        panel: the axes, whose limits are final and whose figure has been laid out.
        points: x, y and text.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure: Any = panel.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    # Places are found in pixels, and written in points, whatever the file's resolution.
    points_a_pixel = 72 / figure.dpi
    centres = panel.transData.transform([(x, y) for x, y, _ in points]) if points else []
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in centres]
    frame = panel.get_window_extent(renderer).extents
    for (x, y, text), (cx, cy) in zip(points, centres, strict=True):
        drawn = panel.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=SIZE,
            ha="center",
            va="center",
            zorder=4,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )
        extent = drawn.get_window_extent(renderer)
        width, height = extent.width + 2, extent.height + 1
        for dx, dy, far in _offsets(width, height):  # noqa: B007 - of the place that is taken
            left, bottom = cx + dx - width / 2, cy + dy - height / 2
            box = (left, bottom, left + width, bottom + height)
            if _inside(box, frame) and not any(_overlap(box, other) for other in taken):
                break
        else:
            drawn.remove()
            continue
        drawn.xyann = (dx * points_a_pixel, dy * points_a_pixel)
        taken.append(box)
        if far:
            # From the edge of the text that faces the point.
            edge = dy - height / 2 if dy > 0 else dy + height / 2 if dy < 0 else 0.0
            panel.annotate(
                "",
                (x, y),
                xytext=(dx * points_a_pixel, edge * points_a_pixel),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": "grey", "shrinkB": 3},
                zorder=2,
            )


def _offsets(width: float, height: float) -> Iterator[tuple[float, float, bool]]:
    """Yield where the middle of a text may lie, from the point: near places first."""
    for ring in range(8):
        away = RADIUS + 2 + 14 * ring
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            yield dx * (away + width / 2), dy * (away + height / 2), ring > 0


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(box: Box, frame: Any) -> bool:
    left, bottom, right, top = frame
    return left <= box[0] and box[2] <= right and bottom <= box[1] and box[3] <= top
