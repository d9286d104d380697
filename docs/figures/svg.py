"""A few shapes as SVG text: boxes, arrows and labels that can be read on light and dark pages.

Text stands in shapes with a fill of their own, or in a grey that both backgrounds carry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
GREY = "#7b8694"
PINK = "#d6336c"
STYLES = {  # fill, stroke, text
    "slow": ("#dbe9ff", "#3b6fd4", "#12305f"),
    "fast": ("#ffe7cc", "#d9822b", "#5c3000"),
    "good": ("#dcf5e3", "#2f9e5b", "#0f4023"),
    "plain": ("#eef0f3", "#8a939e", "#24292f"),
    "pink": ("#ffe3ec", PINK, "#6b0f33"),
}


@dataclass
class Drawing:
    """Shapes on a canvas of `width` x `height`; `title` is what a screen reader says."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def text(
        self, x, y, words, *, size=15.0, color=GREY, anchor="middle", mono=False, bold=False
    ) -> None:
        """One line, its middle at height `y`."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y + size * 0.35:g}" font-size="{size:g}" fill="{color}" '
            f'text-anchor="{anchor}" font-family="{MONO if mono else SANS}"{weight}>'
            f"{escape(words)}</text>"
        )

    def rect(self, x, y, w, h, style="plain", *, radius=8.0, stroke=1.5, dash="") -> None:
        """A rectangle."""
        fill, line, _ = STYLES[style]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{line}" stroke-width="{stroke:g}"{dashed}/>'
        )

    def box(self, x, y, w, h, lines, style="plain", *, size=15.0, dash="") -> None:
        """A box with centred lines; `**` before a line is bold, a backtick is code."""
        self.rect(x, y, w, h, style, dash=dash)
        lines = [lines] if isinstance(lines, str) else lines
        step = size * 1.35
        top = y + h / 2 - step * (len(lines) - 1) / 2
        for i, line in enumerate(lines):
            self.text(
                x + w / 2,
                top + i * step,
                line.lstrip("*`"),
                size=size if not line.startswith("`") else size * 0.93,
                color=STYLES[style][2],
                mono="`" in line[:3],
                bold=line.startswith("**"),
            )

    def line(self, points, *, color=GREY, width=2.0, head=True, dash="") -> None:
        """Straight lines through `points`, with an arrow head at the last one."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.path(path, color=color, width=width, head=head, dash=dash)

    def curve(self, start, end, bend, *, color=GREY, width=2.0, dash="") -> None:
        """An arc whose middle lies `bend` above the chord (below, if negative)."""
        (x0, y0), (x1, y1) = start, end
        path = f"M{x0:g} {y0:g} Q{(x0 + x1) / 2:g} {(y0 + y1) / 2 - 2 * bend:g} {x1:g} {y1:g}"
        self.path(path, color=color, width=width, dash=dash)

    def path(self, path, *, color=GREY, width=2.0, head=True, dash="") -> None:
        """A path in SVG's own language."""
        marker = f' marker-end="url(#head{color[1:]})"' if head else ""
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{marker}'
            f"{dashed}/>"
        )

    def circle(self, x, y, r, style="fast", label="", *, size=14.0) -> None:
        """A disc, perhaps with a label."""
        fill, line, color = STYLES[style]
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{fill}" stroke="{line}" '
            'stroke-width="1.5"/>'
        )
        if label:
            self.text(x, y, label, size=size, color=color)

    def save(self, path: Path) -> None:
        """Write the file."""
        heads = "".join(
            f'<marker id="head{c[1:]}" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" '
            f'fill="{c}"/></marker>'
            for c in (GREY, PINK)
        )
        body = "\n".join(self.parts)
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} '
            f'{self.height:g}" width="{self.width:g}" height="{self.height:g}" role="img" '
            f'aria-label="{escape(self.title)}">\n<title>{escape(self.title)}</title>\n'
            f"<defs>{heads}</defs>\n{body}\n</svg>\n"
        )
