# SPDX-License-Identifier: Apache-2.0
"""Downloads against a real server on this machine: resumed, verified, recorded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from litv2.weights.download import fetch
from litv2.weights.releases import ZOO


def checkpoint(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.full((50_000,), value)}, buffer)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves one file, well or badly."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = checkpoint(1.0)
        self.etag = '"one"'
        self.ranges = True  # knows Range
        self.if_range = True  # knows If-Range
        self.status = 200
        self.says_length = True
        self.breaks_after: list[int] = []  # bytes after which each of the next connections ends
        self.asked: list[str | None] = []  # the Range of each request
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1/model.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        start, size = 0, len(server.content)
        same = not server.if_range or self.headers.get("If-Range", server.etag) == server.etag
        if wanted and server.ranges and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= size:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        if server.says_length:
            self.send_header("Content-Length", str(size - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        end = start + server.breaks_after.pop(0) if server.breaks_after else size
        self.wfile.write(server.content[start:end])

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of the user's; no proxy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub/checkpoints"


def records(cache: Path) -> dict:
    return json.loads((cache / "litv2.lock.json").read_text())


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))


def test_downloads_once_and_records(server, cache, capsys):
    path = fetch(server.url)
    assert path == cache / "model.pth" and path.read_bytes() == server.content
    record = records(cache)[server.url]
    assert record["sha256"] == hashlib.sha256(server.content).hexdigest() and record["size"] == len(server.content)
    assert left_over(cache) == ["litv2.lock.json", "model.pth"]
    assert fetch(server.url) == path and len(server.asked) == 1
    assert server.url in capsys.readouterr().err


def test_goes_on_after_a_break(server, cache):
    """Within one call, as long as something arrives: no byte is asked for twice."""
    server.breaks_after = [70_000, 50_000]
    assert fetch(server.url).read_bytes() == server.content
    assert server.asked == [None, "bytes=70000-", "bytes=120000-"]


def test_goes_on_at_the_next_call(server, cache):
    server.breaks_after = [70_000, 0]
    with pytest.raises(OSError, match=rf"truncated.*70000 bytes are kept.*put the file at {cache / 'model.pth'}") as error:
        fetch(server.url)
    assert server.url in str(error.value) and not (cache / "model.pth").exists()
    assert fetch(server.url).read_bytes() == server.content
    assert server.asked[-1] == "bytes=70000-" and left_over(cache) == ["litv2.lock.json", "model.pth"]


@pytest.mark.parametrize("change", ["no ranges", "another file", "another file, no If-Range", "a shorter file", "no validator"])
def test_goes_on_where_it_cannot(server, cache, change):
    """The server sends all of the file, or has another one by now: the result is always one whole file."""
    if change == "no validator":
        server.etag = ""
    server.breaks_after = [70_000, 0]
    with pytest.raises(OSError):
        fetch(server.url)
    if change == "no ranges":
        server.ranges = False
    elif change == "a shorter file":
        server.content, server.etag, server.if_range = _small(), '"two"', False
    elif change.startswith("another"):
        server.content, server.etag, server.if_range = checkpoint(2.0), '"two"', "no If-Range" not in change
    assert fetch(server.url).read_bytes() == server.content
    if server.if_range:  # the answer to the second call's one request is the whole
        assert server.asked == [None, "bytes=70000-", "bytes=70000-"]


def _small() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("status", [404, 403, 500])
def test_http_errors(server, cache, status):
    server.status = status
    with pytest.raises(OSError, match=f"HTTP {status}.*put the file at") as error:
        fetch(server.url)
    assert server.url in str(error.value) and len(server.asked) == 1


def test_no_network(server, cache):
    server.server_close()
    with pytest.raises(OSError, match="cannot be downloaded.*put the file at"):
        fetch(server.url)
    with pytest.raises(OSError, match="cannot be downloaded"):
        fetch("https://name.invalid/model.pth")


def test_without_length_a_truncated_file_is_no_checkpoint(server, cache):
    server.says_length = False
    server.content = server.content[:-500]
    with pytest.raises(ValueError, match="truncated"):
        fetch(server.url)
    assert not (cache / "model.pth").exists() and not (cache / "model.pth.part").exists()
    server.content = checkpoint(1.0)
    assert fetch(server.url).read_bytes() == server.content


def test_a_web_page_is_no_checkpoint(server, cache):
    server.content = b"<html>please log in</html>"
    with pytest.raises(ValueError, match="web page"):
        fetch(server.url)
    assert not (cache / "model.pth").exists() and not (cache / "litv2.lock.json").exists()


def test_another_content_is_an_error_ever_after(server, cache):
    path = fetch(server.url)
    first = path.read_bytes()
    path.write_bytes(checkpoint(2.0))
    with pytest.raises(ValueError, match="not the file that was first recorded.*litv2.lock.json") as error:
        fetch(server.url)
    assert server.url in str(error.value) and records(cache)[server.url]["sha256"] in str(error.value)
    path.unlink()
    server.content, server.etag = checkpoint(2.0), '"two"'
    with pytest.raises(ValueError, match="not the file that was first recorded"):
        fetch(server.url)
    assert not path.exists()
    server.content = first
    assert fetch(server.url).read_bytes() == first


def test_same_content_at_another_time_is_fine(server, cache):
    """A copy with another time of modification is hashed once, then known again."""
    path = fetch(server.url)
    os.utime(path, (1, 1))
    fetch(server.url)
    assert records(cache)[server.url]["mtime_ns"] == 10**9 and len(server.asked) == 1


def test_by_hand(server, cache, capsys):
    """A file that was put there is taken and recorded; one that is damaged is not."""
    cache.mkdir(parents=True)
    (cache / "model.pth").write_bytes(server.content[:-500])
    with pytest.raises(ValueError, match="truncated"):
        fetch(server.url)
    assert not (cache / "litv2.lock.json").exists()
    (cache / "model.pth").write_bytes(server.content)
    assert fetch(server.url) == cache / "model.pth" and server.asked == []
    assert "by hand" in capsys.readouterr().err
    assert records(cache)[server.url]["sha256"] == hashlib.sha256(server.content).hexdigest()
    (cache / "model.pth").write_bytes(checkpoint(3.0))
    with pytest.raises(ValueError, match="first recorded"):
        fetch(server.url)


def test_two_urls_of_one_file_name(server, cache):
    fetch(server.url)
    with pytest.raises(ValueError, match="is the file of"):
        fetch(server.url.replace("/v1/", "/v2/"))


def test_damaged_record(server, cache):
    fetch(server.url)
    (cache / "litv2.lock.json").write_text("{")
    with pytest.raises(ValueError, match="litv2.lock.json is damaged"):
        fetch(server.url)


@pytest.mark.extra
def test_several_processes_download_once(server, cache):
    """As under torchrun, where every process asks for the weights."""
    code = f"from litv2.weights.download import fetch; print(fetch({server.url!r}).stat().st_size)"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == [str(len(server.content))] * 3
    assert len(server.asked) == 1


def test_paths_and_names(cache, tmp_path):
    entry = ZOO["litv2_small"]
    cache.mkdir(parents=True)
    (cache / entry.file).write_bytes(checkpoint(1.0))
    assert fetch("litv2_small") == cache / entry.file
    assert list(records(cache)) == [entry.url]
    (tmp_path / "litv2_small").write_text("a file of that name comes first")
    assert fetch("litv2_small") == Path("litv2_small")
    with pytest.raises(FileNotFoundError, match="litv2_smal.*similar names: litv2_small"):
        fetch("litv2_smal")
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere/litv2_smal$"):
        fetch("nowhere/litv2_smal")
    for url in ("http://127.0.0.1/", "http://127.0.0.1/a/..", "http://127.0.0.1/litv2.lock.json"):
        with pytest.raises(ValueError, match="does not end in a file name"):
            fetch(url)


def test_the_progress_bar(server, cache, monkeypatch):
    """On a terminal: torch.hub's, over the whole file, from where it goes on."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    server.breaks_after = [70_000]
    fetch(server.url)
    assert "100%" in terminal.getvalue() and f"{len(server.content) / 1024:.0f}k" in terminal.getvalue()
