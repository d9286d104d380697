"""Every migration page has what it promises: a table whose rows are pairs that a test runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import metafocus as mf
from migration import pairs

RIVALS = ["betty", "boat", "focusft_official", "higher", "learn2learn", "torchopt"]


@pytest.mark.parametrize("page", RIVALS)
def test_each_row_of_the_table_is_a_pair(page):
    assert pairs.first_cells(page) == pairs.idioms(page)
    assert len(pairs.idioms(page)) >= 3


@pytest.mark.parametrize("page", RIVALS)
def test_each_block_compiles_and_leaves_its_result(page):
    """Also where the other library is not installed, so that a page cannot rot unseen."""
    for title in pairs.idioms(page):
        (first, theirs), (second, ours) = pairs.sections(page)[title]
        assert (first, second) == ("py", "python"), title
        for code, name in ((theirs, "theirs"), (ours, "ours")):
            names = {
                node.id
                for node in ast.walk(ast.parse(code))
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
            assert name in names, f"{page}, {title}: {name} is not set"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("page", RIVALS)
def test_our_blocks_run_alone(page, tmp_path, monkeypatch):
    """Where the other library is not installed, ours still is what the page shows."""
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "mf": mf, "__name__": page}
    for title, found in pairs.sections(page).items():
        for kind, code in found:
            if kind == "python":
                exec(compile(code, f"{page}.md, {title}", "exec"), names)
        if title != "Setup":
            leaves = torch.utils._pytree.tree_leaves(names.pop("ours"))
            assert leaves and all(torch.isfinite(leaf).all() for leaf in leaves), title


def test_a_wrong_gradient_is_found(monkeypatch):
    blocks = [("py", "theirs = torch.ones(3).double()"), ("python", "ours = theirs * (1 + 1e-6)")]
    monkeypatch.setattr(pairs, "sections", lambda page: {"one": blocks})
    with pytest.raises(AssertionError, match="not close"):
        pairs.check("any", "one")
    monkeypatch.setattr(pairs, "sections", lambda page: {"one": blocks[:1]})
    with pytest.raises(AssertionError, match="any, one"):
        pairs.check("any", "one")


def test_where_other_libraries_are(monkeypatch, tmp_path):
    packages = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    monkeypatch.setenv("METAFOCUS_RIVALS", f"{tmp_path / 'env'}:{tmp_path}")
    assert pairs.folders() == [str(packages), str(tmp_path)]
    monkeypatch.delenv("METAFOCUS_RIVALS")
    assert pairs.folders() == []


def test_the_index_names_every_page():
    text = (pairs.PAGES / "index.md").read_text()
    for page in RIVALS:
        assert f"({page}.md)" in text
    assert {p.stem for p in Path(pairs.PAGES).glob("*.md")} == {*RIVALS, "index"}
    assert torch.get_default_dtype() == torch.float32
