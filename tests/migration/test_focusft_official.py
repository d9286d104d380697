"""Each pair of docs/migration/focusft_official.md, against the authors' own code.

METAFOCUS_FOCUSFT_REPO is a copy of https://github.com/JarvisPei/FocuSFT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from migration import pairs

REPO = os.environ.get("METAFOCUS_FOCUSFT_REPO")
if REPO is None:
    pytest.skip("METAFOCUS_FOCUSFT_REPO is not set", allow_module_level=True)
if not (Path(REPO) / "focusft" / "memory.py").exists():
    pytest.fail(f"METAFOCUS_FOCUSFT_REPO={REPO} holds no focusft/memory.py", pytrace=False)
sys.path.append(REPO)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", pairs.idioms("focusft_official"))
def test_pair(title, tmp_path, monkeypatch):
    """Their clipping divides by the norm plus 1e-12; all else is the same arithmetic.

    With sync_inner it is torch's, which adds 1e-6 to norms of 0.1 and more.
    """
    monkeypatch.chdir(tmp_path)
    rtol = 1e-5 if title == "Clipping all together" else 1e-9
    pairs.check("focusft_official", title, rtol)
