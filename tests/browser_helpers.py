# SPDX-License-Identifier: Apache-2.0
"""Pages in a real browser: headless Chromium through Playwright, and a server of static files. Tests skip where there is no browser."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 120_000  # milliseconds: the machine may be busy


@contextmanager
def chromium() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -r requirements-test.txt")
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.skip(f"no browser: install one of {', '.join(CHROMIUM)}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])  # which root may not use
        try:
            yield browser
        finally:
            browser.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves the files of a folder on a free port of this machine alone; yields the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def opened(browser: Browser, address: str, expected_error: str | None = None, **options) -> Iterator[Page]:
    """A page in a profile of its own. At the end, nobody but the server must have been asked, and the console must show no error other
    than the one that is expected."""
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT)
    requests, errors = [], []
    context.on("request", lambda request: requests.append(request.url))
    context.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    try:
        page = context.new_page()
        page.goto(address)
        yield page
    finally:
        context.close()
    assert address in requests
    assert not [url for url in requests if not url.startswith((address, f"blob:{address}", "data:"))]
    assert not [error for error in errors if expected_error is None or expected_error not in error]
