"""pytest's entry to `metafocus.claims`: options, the marker `claim` and the fixture `claim`.

pytest imports this module in every run on a machine where metafocus is installed. It lies outside
the package because importing anything from the package imports torch first, which takes seconds
and 200 MB. `metafocus.claims` is imported when a test uses the fixture or an option asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from metafocus.claims.marker import Claim


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("claims", "published claims as tests (metafocus)")
    group.addoption(
        "--claims",
        metavar="REPORT.json",
        help="write what the claims measured to REPORT.json, and a page REPORT.md beside it",
    )
    group.addoption("--claims-only", metavar="ID,ID", help="run the tests of these claims only")
    group.addoption(
        "--claims-full",
        action="store_true",
        help="set claim.full: the published budgets instead of quick ones",
    )
    group.addoption(
        "--claims-list",
        metavar="LIST.json",
        help="write what the tests claim to LIST.json and run none of them",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Describe the marker; import the rest if an option asks for it."""
    config.addinivalue_line(
        "markers",
        "claim(id, *, paper, says, published, note='', asserted=True): the test reproduces a "
        "published claim; the fixture `claim` records what it measured (metafocus)",
    )
    option = config.option
    if option.claims_list:
        # Before pytest-xdist's own configuration, which starts no workers then.
        option.collectonly = True
    if option.claims or option.claims_only or option.claims_list:
        from metafocus.claims.plugin import register

        register(config)


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> Claim:
    """Record what this test measured: `claim(value)`; `claim.full` asks for the full budget."""
    from metafocus.claims.marker import Claim

    return Claim(request.node, full=request.config.option.claims_full)
