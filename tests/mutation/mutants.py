"""Small changes of a source file, one at a time: what `run.py` looks for tests against."""

from __future__ import annotations

import ast
import collections
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Calls that return their argument in another state: dropping one leaves a program that runs.
DROPPED = {
    "clone",
    "constants",
    "contiguous",
    "detach",
    "differentiable_once",
    "differentiable_twice",
    "flip",
    "leaf_alias",
    "replayed",
    "sqrt",
    "to",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file; `source` is the whole changed file.

    `name` stays the same while other lines of the file change.
    """

    name: str
    line: int
    kind: str
    before: str
    after: str
    source: str


def mutants(source: str) -> list[Mutant]:
    """Return every mutant of a file that compiles, in the order of the file."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found, seen, names = [], set(), collections.Counter()
    for node in _nodes(ast.parse(source)):
        for kind, new in _changes(node):
            # Columns of ast count bytes.
            text, code = source.encode(), f"({ast.unparse(new)})"
            first = starts[node.lineno - 1] + node.col_offset
            last = starts[node.end_lineno - 1] + node.end_col_offset
            changed = (text[:first] + code.encode() + text[last:]).decode()
            if changed in seen or not _compiles(changed):
                continue
            seen.add(changed)
            old = " ".join(text[first:last].decode().split())
            digest = hashlib.sha256(f"{kind} {old} {code}".encode()).hexdigest()[:10]
            names[digest] += 1
            name = f"{digest}.{names[digest]}"
            found.append(Mutant(name, node.lineno, kind, old, code[1:-1], changed))
    return found


def _nodes(node: ast.AST) -> Iterator[ast.expr]:
    """Walk over expressions; annotations and the messages of errors are left as they are."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.expr):
        yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _nodes(child)


def _changes(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield "comparison", _with(node, ops=[COMPARED[type(node.ops[0])]()])
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield "arithmetic", _with(node, op=COMPUTED[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield "and or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp):
        kind = {ast.Not: "not removed", ast.Invert: "~ removed", ast.USub: "minus removed"}
        yield kind.get(type(node.op), "sign removed"), node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", ast.Constant(node.value + 1)
        yield "constant", ast.Constant(node.value - 1)
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else None
    if isinstance(node.func, ast.Name):
        name = node.func.id
    if name in DROPPED:
        method = isinstance(node.func, ast.Attribute) and not (
            isinstance(node.func.value, ast.Name) and node.func.value.id in ("pt", "torch")
        )
        if method:
            yield "call dropped", node.func.value
        elif node.args:
            yield "call dropped", node.args[0]
    if len(node.args) >= 2 and name not in ("isinstance", "getattr", "hasattr"):
        *rest, a, b = node.args
        yield "arguments swapped", _with(node, args=[*rest, b, a])
    for i in range(len(node.keywords)):
        yield "keyword deleted", _with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def _with(node: ast.expr, **fields: object) -> ast.expr:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True
