"""Figures of profiles: masses by layer, heat maps side by side, and changes during training."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metafocus.errors import ProblemError

if TYPE_CHECKING:
    from metafocus.diagnostics.profile import AttentionProfile, Moment

# Readers with limited colour vision can distinguish these colours (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, PINK)
MARKERS = ("o", "s", "^", "D")
SUFFIXES = (".png", ".svg", ".pdf")
MOST = 4
FAINTEST = 1e-4


def plot_profile(
    profile: AttentionProfile, path: str | Path, *, layer: int | None = None, row: int = 0
) -> None:
    """Write a figure of the masses of answer queries by layer, next to one heat map.

    Args:
        profile: The profile.
        path: The file; its suffix is `.png`, `.svg` or `.pdf`.
        layer: The layer of the heat map; default the middle one.
        row: The row of the batch.
    """
    figure = _figure(path, (10.5, 4.4))
    left, right = figure.subplots(1, 2)
    lines = [
        ("sink (first key)", profile.sink_mass, BLUE, "o"),
        ("context engagement", profile.context_engagement, GREEN, "^"),
        ("largest column", profile.max_column_mass, ORANGE, "s"),
    ]
    if profile.needle_mass is not None:
        lines.append(("evidence", profile.needle_mass, PINK, "D"))
    for label, values, colour, marker in lines:
        _line(left, range(len(values)), values.tolist(), label, colour, marker)
    _by_layer(left, len(profile.cells), "probability mass of answer queries")
    _scale(left, [value for _, values, _, _ in lines for value in values.tolist()])
    # The legend is above the axes, where no line can cross it.
    left.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    _heatmaps(figure, [right], [profile], layer, row)
    right.set_title(f"layer {_index(profile, layer)}, mean over heads", fontsize=10)
    figure.savefig(path, dpi=150)


def plot_comparison(
    profiles: Mapping[str, AttentionProfile],
    path: str | Path,
    *,
    layer: int | None = None,
    row: int = 0,
) -> None:
    """Write a figure of up to four profiles: masses by layer above, heat maps below.

    Args:
        profiles: The profiles by name, such as `{"SFT": before, "FocuSFT": after}`.
        path: The file; its suffix is `.png`, `.svg` or `.pdf`.
        layer: The layer of the heat maps; default the middle one of each profile.
        row: The row of the batch.

    Raises:
        ProblemError: If there is no profile or more than four, or if the suffix is unknown.
    """
    if not 1 <= len(profiles) <= MOST:
        raise ProblemError(
            f"plot_comparison shows 1 to {MOST} profiles, got {len(profiles)}; pass a dict of name "
            "and profile, and split larger ones."
        )
    width = max(3.2 * len(profiles), 9.6)
    below_height = min(width / len(profiles), 4.0) + 0.5
    figure = _figure(path, (width, 2.9 + below_height))
    above, below = figure.subfigures(2, 1, height_ratios=(2.9, below_height))
    for axis, name, title in zip(
        above.subplots(1, 3),
        ("sink_mass", "context_engagement", "max_column_mass"),
        ("sink mass (first key)", "context engagement", "largest column, wherever it is"),
        strict=True,
    ):
        shown: list[float] = []
        for i, (label, profile) in enumerate(profiles.items()):
            values = getattr(profile, name).tolist()
            shown += values
            _line(axis, range(len(values)), values, label, COLOURS[i], MARKERS[i])
        _by_layer(axis, max(len(p.cells) for p in profiles.values()), None)
        _scale(axis, shown)
        axis.set_title(title, fontsize=10)
    handles, labels = above.axes[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside upper center", ncols=MOST, frameon=False)
    maps = list(below.subplots(1, len(profiles), squeeze=False)[0])
    _heatmaps(below, maps, list(profiles.values()), layer, row)
    shown_layers = sorted({_index(profile, layer) for profile in profiles.values()})
    below.suptitle(f"layer {' or '.join(map(str, shown_layers))}, mean over heads", fontsize=10)
    for axis, label in zip(maps, profiles, strict=True):
        axis.set_title("\n".join(textwrap.wrap(label, 34)), fontsize=9)
        if axis is not maps[0]:
            axis.set_ylabel("")
    figure.savefig(path, dpi=150)


def plot_engagement(history: Sequence[Moment], path: str | Path) -> None:
    """Write a figure of how sink mass and context engagement changed during training.

    Args:
        history: The moments, such as `ProfileCallback.history`.
        path: The file; its suffix is `.png`, `.svg` or `.pdf`.

    Raises:
        ProblemError: If the history is empty or the suffix is unknown.
    """
    if not history:
        raise ProblemError("plot_engagement: history is empty; record at least one moment.")
    figure = _figure(path, (10.5, 3.9))
    left, right = figure.subplots(1, 2)
    steps = [moment.step for moment in history]
    for axis, panel in (
        (left, (("context engagement", "context_engagement", GREEN, "^"),
                ("evidence", "needle_mass", PINK, "D"))),
        (right, (("sink (first key)", "sink_mass", BLUE, "o"),
                 ("largest column", "max_column_mass", ORANGE, "s"))),
    ):  # fmt: skip
        shown: list[float] = []
        for label, name, colour, marker in panel:
            values = [getattr(moment, name) for moment in history]
            if None not in values:
                shown += values
                _line(axis, steps, values, label, colour, marker)
        _scale(axis, shown)
        axis.set_xlabel("outer step")
        axis.set_ylabel("mass, mean over layers")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _figure(path: str | Path, size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    if Path(path).suffix not in SUFFIXES:
        raise ProblemError(f"path={str(path)!r} must end in {', '.join(SUFFIXES)}.")
    # Without pyplot, no window opens and the back end of a notebook does not change.
    return Figure(figsize=size, layout="constrained")


def _line(axis: Any, x: Any, y: list[float], label: str, colour: str, marker: str) -> None:
    axis.plot(list(x), y, color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)
    axis.grid(True, alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _by_layer(axis: Any, layers: int, ylabel: str | None) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 8), min_n_ticks=1))
    axis.set_xlabel("layer")
    if ylabel:
        axis.set_ylabel(ylabel)


def _scale(axis: Any, values: list[float]) -> None:
    """Use a logarithmic axis if the values span more than a factor of 30, else start at 0."""
    finite = [v for v in values if v == v]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if low > 0 and high > 30 * low:
        axis.set_yscale("log")
        _round_numbers(axis.yaxis)
    else:
        axis.set_ylim(0, 1.08 * high or 1.0)


def _round_numbers(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times powers of ten, as plain numbers."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _index(profile: AttentionProfile, layer: int | None) -> int:
    index = profile.middle if layer is None else layer
    return index + len(profile.cells) if index < 0 else index


def _heatmaps(
    figure: Any, axes: list[Any], profiles: list[AttentionProfile], layer: int | None, row: int
) -> None:
    """Draw one map on each axis, all with the same colours, and one colour bar."""
    import matplotlib
    from matplotlib.colors import LogNorm

    maps = [_cropped(profile, layer, row) for profile in profiles]
    positive = torch.cat([cells[cells > 0] for cells, _ in maps])
    low, high = FAINTEST, 1.0
    if len(positive):
        # A few extreme cells, such as those of the first queries, must not use up the colours.
        ranked = positive.sort().values
        low, high = (float(ranked[int(f * (len(ranked) - 1))]) for f in (0.01, 0.995))
        high = max(high, 1e-30)
        low = max(min(low, high / 3), high * FAINTEST)
    colours = matplotlib.colormaps["magma"].with_extremes(bad="#e6e6e6")
    image = None
    for axis, profile, (cells, edges) in zip(axes, profiles, maps, strict=True):
        image = axis.imshow(
            torch.where(cells > 0, cells.clamp(min=low / 2), torch.nan).numpy(),
            extent=(edges[0], edges[1], edges[1], edges[0]),
            cmap=colours,
            norm=LogNorm(low, high),
            interpolation="nearest",
            aspect="equal",
        )
        _mark_answers(axis, profile.answers[row])
        axis.set(xlabel="key", ylabel="query (bar: answers)", xlim=edges, ylim=edges[::-1])
    bar = figure.colorbar(image, ax=axes, shrink=0.85, extend="both")
    _round_numbers(bar.ax.yaxis)
    blocks = {profile.block for profile in profiles}
    keys = f"{max(blocks)} keys" if blocks != {1} else "key"
    bar.set_label(f"attention from query to {keys}", fontsize=9)
    bar.outline.set_visible(False)


def _cropped(
    profile: AttentionProfile, layer: int | None, row: int
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return the map without the padding at its ends, and its first and last token."""
    cells = profile.heatmap(layer, row)
    kept = (~cells.isnan().all(-1)).nonzero().flatten()
    first, last = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, len(cells))
    edges = (first * profile.block, min(last * profile.block, profile.length))
    return cells[first:last, first:last], edges


def _mark_answers(axis: Any, answers: torch.Tensor) -> None:
    flags = answers.int().diff(prepend=torch.zeros(1), append=torch.zeros(1))
    begins, ends = ((flags == sign).nonzero().flatten().tolist() for sign in (1, -1))
    for begin, end in zip(begins, ends, strict=True):
        axis.plot(
            [1.025, 1.025],
            [begin, end],
            color=ORANGE,
            linewidth=4,
            solid_capstyle="butt",
            # The bar is next to the map: x is a fraction of its width, y is in tokens.
            transform=axis.get_yaxis_transform(),
            clip_on=False,
        )
