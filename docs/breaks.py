"""A hook of mkdocs: code in tables may break after a dot, a slash, an underscore or a bracket.

Without it a narrow cell breaks code in the middle of a word, or a table is wider than a phone.
Numbers such as 1e-07 and flags such as `--output_dir` stay in one piece.
"""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Return the page with places where code in cells may break."""
    html = re.sub(r"<td.*?</td>", lambda cell: _in_code(cell[0]), html, flags=re.S)
    # A browser may break after each hyphen, so also between the two of a flag and its name.
    return re.sub(r"--[a-z]\w*(?![^<]*>)", r'<span class="whole">\g<0></span>', html)


def _in_code(cell: str) -> str:
    whole = re.sub(r"\d[\d.]*e-\d+(?![^<]*>)", r'<span class="whole">\g<0></span>', cell)
    return re.sub(r"<code>[^<]*</code>", lambda code: _broken(code[0]), whole)


def _broken(code: str) -> str:
    """Return code with `<wbr>` after what separates its words.

    Example:
        >>> _broken("<code>torch.func.grad(f)</code>")
        '<code>torch.<wbr>func.<wbr>grad(<wbr>f)</code>'
    """
    inside = code.removeprefix("<code>").removesuffix("</code>")
    return f"<code>{re.sub(r'(?<=[._/,=(:])(?=[^.<&])', '<wbr>', inside)}</code>"
