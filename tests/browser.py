"""Chromium without a window: what a page holds, what a script finds on it, and a picture of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import splitfx

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("sandbox", "first-run"), ("gpu", "quic", "sync", "background-networking", "component-update")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


def dom(page: Path, browser: Path, *more: str) -> str:
    """The page when its scripts have run; ``browser`` is the folder of a profile."""
    assert CHROMIUM is not None
    no, disable = QUIET
    flags = ["--headless", *(f"--no-{one}" for one in no), *(f"--disable-{one}" for one in disable)]
    flags += [f"--user-data-dir={browser}", *(more or ["--dump-dom"])]
    return subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120).stdout


def probed(graph: Any, script: str, folder: Path) -> dict[str, Any]:
    """What a script finds on the page of a graph: it fills ``found``. Errors of any script are in ``errors``."""
    page = splitfx.inspect_html(graph, folder / "page.html")
    text = page.read_text().replace(
        "<body>",
        "<body><script>var errors=[];addEventListener('error',e=>errors.push(e.message));"
        "console.error=console.warn=(...told)=>errors.push(told.join(' '))</script>",
    )
    probe = f"""<script>var found={{}};try{{{script}}}catch(e){{errors.push(String(e))}}
    found.errors=errors;document.body.setAttribute('data-found',encodeURIComponent(JSON.stringify(found)))</script></body>"""
    probing = folder / "probing.html"
    probing.write_text(text.replace("</body>", probe))
    told = re.search(r'data-found="([^"]*)"', dom(probing, folder / "browser"))
    assert told is not None, "the script did not run"
    return json.loads(unquote(told[1]))


def picture(page: Path, png: Path, browser: Path, size: tuple[int, int] = (1280, 1600)) -> None:
    dom(page, browser, f"--screenshot={png}", "--hide-scrollbars", "--window-size={},{}".format(*size))
