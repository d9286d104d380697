"""The attention of a model as numbers: by layer, by head, and as heat maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metafocus.diagnostics.measures import QUERIES, Measures
from metafocus.diagnostics.roles import SINKS
from metafocus.errors import ProblemError
from metafocus.files import finite, write_json

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    ("sink", "sink_mass", "8.4f"),
    ("sink 4", "sink_mass_4", "8.4f"),
    ("context", "context_engagement", "8.4f"),
    ("needle", "needle_mass", "8.4f"),
    ("max col", "max_column_mass", "8.4f"),
    ("at", "max_column_index", "6d"),
    ("entropy", "entropy", "8.3f"),
    ("eff. keys", "effective_keys", "10.1f"),
)


@dataclass(frozen=True)
class AttentionProfile:
    """The attention masses of every layer; made by `attention_profile`.

    The measures are attributes (`sink_mass`, ...) of shape `[layers]`, means over answer queries
    and over heads. `max_column_mass` is the largest column of the matrix averaged over heads.

    Attributes:
        layers: `Measures` of shape `[layers]` for each set of queries in `QUERIES`.
        heads: The same measures by head, `[layers, heads]`.
        cells: Heat maps, `[layers, B, n, n]`; see `heatmap`.
        answers: Which tokens are answers, `[B, S]`.
        length: The number of tokens in a row, `S`.
        block: The number of tokens along the side of a cell.
    """

    layers: Mapping[str, Measures]
    heads: Mapping[str, Measures]
    cells: Tensor
    answers: Tensor
    length: int
    block: int

    @property
    def by_head(self) -> Measures:
        """The measures by head over answer queries, each `[layers, heads]`."""
        return self.heads["answer"]

    @property
    def sink_mass(self) -> Tensor:
        """Mass on the first key of the document, `[layers]`."""
        return self.layers["answer"].sink_mass

    @property
    def context_engagement(self) -> Tensor:
        """Mass on keys that are not an answer, the first key or the query itself, `[layers]`."""
        return self.layers["answer"].context_engagement

    @property
    def needle_mass(self) -> Tensor | None:
        """Mass on evidence, `[layers]`; None for a batch without `needle_mask`."""
        return self.layers["answer"].needle_mass

    @property
    def max_column_mass(self) -> Tensor:
        """The largest mean mass on one key, `[layers]`: it also finds a sink that has moved."""
        return self.layers["answer"].max_column_mass

    @property
    def max_column_index(self) -> Tensor:
        """The index of that key in its document, `[layers]`; -1 without queries."""
        return self.layers["answer"].max_column_index

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of a query's probabilities in nats, `[layers]`."""
        return self.layers["answer"].entropy

    @property
    def effective_keys(self) -> Tensor:
        """Mean of `exp(entropy)`, `[layers]`."""
        return self.layers["answer"].effective_keys

    def sink(self, n: int = 1, queries: str = "answer", *, by_head: bool = False) -> Tensor:
        """Return the mass on the first `n` keys of the document, over queries after them.

        Args:
            n: 1 or 4.
            queries: "answer", "context" or "all".
            by_head: Whether to return `[layers, heads]` instead of `[layers]`.

        Raises:
            ProblemError: If `n` or `queries` is none of these.
        """
        if n not in SINKS or queries not in QUERIES:
            raise ProblemError(
                f"sink(n={n!r}, queries={queries!r}): n is one of {SINKS}, queries one of "
                f"{', '.join(QUERIES)}."
            )
        chosen = (self.heads if by_head else self.layers)[queries]
        return chosen.sink_mass if n == SINKS[0] else chosen.sink_mass_4

    @property
    def middle(self) -> int:
        """The layer that figures show by default."""
        return len(self.cells) // 2

    def heatmap(self, layer: int | None = None, row: int = 0) -> Tensor:
        """Return the mass from blocks of queries (rows) to blocks of keys (columns).

        It is a mean over heads. Rows sum to 1 for any size of the blocks (with learned sinks they
        sum to less). Up to 128 tokens a block is one token, and the map is the mean attention
        matrix itself.

        Args:
            layer: The layer; default the middle one.
            row: The row of the batch.

        Returns:
            `[n, n]` with `n = ceil(S / block) <= 128`. Rows of padding are NaN.

        Raises:
            ProblemError: If the layer or the row does not exist.
        """
        layer = self.middle if layer is None else layer
        layers, rows = self.cells.shape[:2]
        if not (-layers <= layer < layers and -rows <= row < rows):
            raise ProblemError(
                f"heatmap(layer={layer}, row={row}): the profile has {layers} layers and {rows} "
                "rows, counted from 0."
            )
        return self.cells[layer, row]

    def summary(self, queries: str = "answer") -> dict[str, float]:
        """Return the mean of each measure over layers, except of `max_column_index`."""
        return {
            name: float(value.mean())
            for name, value in self.layers[queries].items()
            if name != "max_column_index"
        }

    def table(self, queries: str = "answer") -> str:
        """Return the measures by layer as text, with their means in the last line."""
        measures = dict(self.layers[queries].items())
        columns = [c for c in _COLUMNS if c[1] in measures]
        widths = [int(spec.split(".")[0].rstrip("d")) for _, _, spec in columns]
        head = "  ".join(f"{c[0]:>{w}}" for c, w in zip(columns, widths, strict=True))
        lines = [f"{'layer':>5}  {head}"]
        for layer in range(len(self.cells)):
            numbers = (format(measures[name][layer].item(), spec) for _, name, spec in columns)
            lines.append(f"{layer:>5}  " + "  ".join(numbers))
        means = self.summary(queries)
        shown = (
            format(means[name], spec) if name in means else " " * width
            for (_, name, spec), width in zip(columns, widths, strict=True)
        )
        return "\n".join([*lines, " mean  " + "  ".join(shown)])

    def plot(self, path: str | Path, *, layer: int | None = None, row: int = 0) -> None:
        """Write the masses by layer and one heat map as a figure.

        Args:
            path: The file; its suffix is `.png`, `.svg` or `.pdf`.
            layer: The layer of the heat map; default the middle one.
            row: The row of the batch.
        """
        # Imported here, because the plots import this module.
        from metafocus.diagnostics.plots import plot_profile

        plot_profile(self, path, layer=layer, row=row)

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the heat maps in a form for JSON; NaN becomes None."""
        found = {
            queries: {
                name: {
                    "layers": _plain(value),
                    "heads": _plain(dict(self.heads[queries].items())[name]),
                }
                for name, value in measures.items()
            }
            for queries, measures in self.layers.items()
        }
        return {"tokens": self.length, "rows": len(self.answers), "queries": found}

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict(), indent=1)

    def to_pandas(self) -> pd.DataFrame:
        """Return one line for each set of queries, layer and head; pandas must be installed."""
        import pandas as pd

        frames = []
        for queries, measures in self.heads.items():
            layers, heads = measures.sink_mass.shape
            index = pd.MultiIndex.from_product(
                [[queries], range(layers), range(heads)], names=["queries", "layer", "head"]
            )
            values = {name: value.flatten().numpy() for name, value in measures.items()}
            frames.append(pd.DataFrame(values, index=index))
        return pd.concat(frames).reset_index()


@dataclass(frozen=True)
class Moment:
    """A profile at one step of the training: means over layers and over answer queries.

    `Measures` describes the measures.

    Attributes:
        step: The number of outer steps so far.
        sink_mass: Mass on the first key.
        context_engagement: Mass on the context.
        needle_mass: Mass on the evidence; None without evidence.
        max_column_mass: Mass on the heaviest key.
        entropy: In nats.
        effective_keys: `exp` of the entropy.
        sink_by_layer: `sink_mass` of each layer.
        engagement_by_layer: `context_engagement` of each layer.
    """

    step: int
    sink_mass: float
    context_engagement: float
    needle_mass: float | None
    max_column_mass: float
    entropy: float
    effective_keys: float
    sink_by_layer: tuple[float, ...]
    engagement_by_layer: tuple[float, ...]

    @classmethod
    def of(cls, step: int, profile: AttentionProfile) -> Moment:
        """Return the means of a profile."""
        means = profile.summary()
        means.pop("sink_mass_4")
        return cls(
            step=step,
            **{"needle_mass": None, **means},
            sink_by_layer=tuple(profile.sink_mass.tolist()),
            engagement_by_layer=tuple(profile.context_engagement.tolist()),
        )  # pyright: ignore[reportArgumentType]


def _plain(value: Tensor) -> Any:
    if value.is_floating_point():
        value = torch.round(value, decimals=9)
    return finite(value.tolist())
