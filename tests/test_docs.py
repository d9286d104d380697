"""Every Python block of README, CONTRIBUTING and docs runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from models import build, chat_batch

import metafocus as mf

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    """Blocks of one page share their names, beside a model, a loader, an optimizer, a file."""
    from metafocus.tokenizer import train_tokenizer

    found = blocks(page)
    if not found:
        return
    monkeypatch.chdir(tmp_path)
    chat = {
        "messages": [
            {"role": "user", "content": "Say hello."},
            {"role": "assistant", "content": "Hello."},
        ]
    }
    Path("chats.jsonl").write_text((json.dumps(chat) + "\n") * 4)
    model = build(dtype=torch.float32)
    names = {
        "torch": torch,
        "mf": mf,
        "model": model,
        "loader": [chat_batch()],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "tokenizer": train_tokenizer(["Say hello. Hello."], vocab_size=300),
        "__name__": page.stem,
    }
    for block in found:
        exec(compile(block, str(page), "exec"), names)


def test_contributed_estimator_is_first_order():
    """CONTRIBUTING's example: straight-through to the start is first-order MAML."""
    names = {"__name__": "contributing"}
    exec(blocks(ROOT / "CONTRIBUTING.md")[0], names)

    def loss(fast, slow, data):
        return ((fast["w"] - data) ** 4).sum()

    problem = mf.Problem(loss, loss, init=lambda slow: slow)
    episode = mf.Episode(torch.zeros(3), torch.ones(3))
    outer = {"w": torch.randn(3)}
    got, want = (
        mf.hypergrad(mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=e))(outer, episode)[0]
        for e in (names["StraightThrough"](), mf.FirstOrder())
    )
    assert torch.allclose(got["w"], want["w"], rtol=1e-6)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
