"""What a page of HTML holds, and what a browser finds in it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest


class Page(HTMLParser):
    """Collects a page's tags, what it loads, where its links go, its anchors, its figures and the words it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.loads, self.links, self.anchors = [], [], [], set()
        self.figures, self.words, self.inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        for key in {"src", "href", "srcset", "data"} & found.keys():
            (self.links if tag == "a" else self.loads).append(found[key])
        self.inside = found.get("type") or tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "application/json":
            self.figures.append(json.loads(data))
        elif self.inside not in ("script", "style", "text/javascript"):
            self.words.append(data)


def browse(folder: Path, address: str, *options: str) -> str:
    """The page's DOM after its scripts have run; ``folder`` is for the browser's own files."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'user'}"]
    command += ["--window-size=700,900", "--enable-logging=stderr", *options, "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    # What a page writes to its console is an error or a warning: ours write nothing.
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
    return shown.stdout


def found_in(dom: str) -> Any:
    """What a script has left in ``document.documentElement.dataset.found``."""
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))


# A window of Chromium is not narrower than 500 pixels; a frame is.
FRAME = """<script>onmessage = event => document.documentElement.dataset.found = event.data</script>
<iframe src="page.html" style="border: 0; width: {width}px; height: 9000px"></iframe>"""


def probed(folder: Path, page: Path, probe: str, width: int) -> Any:
    """What a script posts to the window around a page that is so many pixels wide."""
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width))
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head><script>{probe}</script>", 1)
    (folder / "page.html").write_text(text, encoding="utf-8")
    size = f"--window-size={max(width + 20, 500)},9100"
    return found_in(browse(folder, frame.as_uri(), size, "--virtual-time-budget=30000"))
