"""Look at the built site in a headless browser, at the widths of a desktop and of a phone.

    make docs && python docs/shots.py --output /tmp/shots            # every page
    python docs/shots.py --output /tmp/shots gotchas.html data.html  # some

For each page and width it writes a picture, and prints what is cut off: tables and code that are
wider than their place and do not scroll, and a page that scrolls sideways. It needs Chromium
(Debian's package `chromium`), is run by hand, and the pictures are to be looked at.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

WIDTHS = (1280, 390)
HEIGHT = 3000
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--virtual-time-budget=8000"),
)
# A page in a frame: a browser's own window cannot be as narrow as a phone.
FRAME = """<!doctype html><title>{page}</title><body style="margin:0">
<iframe src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe>
<pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => setTimeout(() => {{
  const doc = frame.contentDocument, found = [];
  const root = doc.documentElement;
  if (root.scrollWidth > root.clientWidth + 1) found.push("the page scrolls sideways");
  const boxes = ["table", "pre", "img", "p", "li"].map((name) => "article " + name).join();
  for (const box of doc.querySelectorAll(boxes)) {{
    const place = box.getBoundingClientRect();
    let scrolls = false;
    for (let up = box; up && up !== root; up = up.parentElement)
      scrolls ||= ["auto", "scroll"].includes(getComputedStyle(up).overflowX);
    if (place.right > root.clientWidth + 1 && !scrolls)
      found.push("cut off: " + box.tagName + " " + box.textContent.trim().slice(0, 60));
  }}
  if (!doc.querySelector("article").innerText.trim()) found.push("the page is blank");
  document.getElementById("found").textContent = found.join("\\n");
}}, 1500);
</script>"""


def main(argv: list[str] | None = None) -> int:
    """Take the pictures; return 1 if anything is cut off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", help="of the site, such as data.html; default: all")
    parser.add_argument("--site", type=Path, default=Path("site"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        parser.error("there is no chromium: apt-get install chromium")
    args.output.mkdir(parents=True, exist_ok=True)
    pages = args.pages or sorted(str(p.relative_to(args.site)) for p in args.site.rglob("*.html"))
    serve = functools.partial(Quiet, directory=str(args.site))
    bad = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for page in pages:
            for width in WIDTHS:
                found = look(browser, args, server.server_address[1], page, width)
                bad += bool(found)
                print(f"{page} at {width}: {found or 'whole'}", flush=True)
        server.shutdown()
    return int(bad > 0)


def look(browser: str, args: argparse.Namespace, port: int, page: str, width: int) -> str:
    """Write the picture of a page at a width; return what is cut off."""
    frame = args.site / f"_shot_{width}.html"
    frame.write_text(FRAME.format(page=page, width=width, height=HEIGHT))
    picture = args.output / f"{page.removesuffix('.html').replace('/', '-')}-{width}.png"
    with tempfile.TemporaryDirectory() as profile:
        size = f"--window-size={max(width, 500)},{HEIGHT}"
        words = [browser, *FLAGS, f"--user-data-dir={profile}", size]
        address = f"http://127.0.0.1:{port}/{frame.name}"
        run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=120)
        run([*words, f"--screenshot={picture}", address])
        done = run([*words, "--dump-dom", address])
    frame.unlink()
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    return found[1].strip() if found else "the browser did not answer"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the site without a line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    raise SystemExit(main())
