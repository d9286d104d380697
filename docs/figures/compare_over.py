"""docs/figures/compare_over.svg: the first figure of docs/comparing.md, from its own code.

python docs/figures/compare_over.py
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    page = (HERE.parent / "comparing.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0]
    names: dict = {}
    os.chdir(tempfile.mkdtemp())
    exec(code, names)
    names["result"].plot(HERE / "compare_over.svg")
