"""Compare the public API with that of the last tag: `python docs/api_changes.py`.

`griffe check` names what was removed or changed in a way that can break a user's code. The exit
code is 1 if there is anything, and 0 if there is nothing, or no tag to compare with.
"""

from __future__ import annotations

import subprocess
import sys


def last_tag() -> str | None:
    """Return the newest tag that HEAD descends from."""
    words = ["git", "describe", "--tags", "--abbrev=0", "--match", "v*"]
    found = subprocess.run(words, capture_output=True, text=True)
    return found.stdout.strip() or None


def main(against: str | None = None) -> int:
    """Compare with a tag or a commit; None: the last tag."""
    against = against or last_tag()
    if against is None:
        print("there is no tag v* yet: nothing to compare with")
        return 0
    words = ["griffe", "check", "metafocus", "--against", against]
    return subprocess.run([sys.executable, "-m", *words]).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
