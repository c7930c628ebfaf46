# SPDX-License-Identifier: Apache-2.0
"""Downloads checkpoints from the zoo or the web into torch.hub's folder: once each, resumable, and verified from then on.

``litv2.lock.json`` in that folder records the size and SHA-256 of each URL's file when it first arrives, by download or by hand.
From then on, different content under that name is an error. A cached file is hashed again only if its size or modification time
differs from the record, since reading 350 MB at each start would add little safety.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch

from ..errors import UserError
from ..files import atomic_write, one_process
from .formats import check_format
from .releases import ZOO, lookup

__all__ = ["cache_folder", "fetch"]

LOCK = "litv2.lock.json"
ATTEMPTS = 5  # connections per call, as long as each makes progress
TIMEOUT = 30.0  # seconds without an answer or data
CHUNK = 1 << 18  # bytes


def fetch(source: str | Path) -> Path:
    """Returns the local file of a path, a URL or a zoo name; the latter two are downloaded once.

    A local file takes precedence over a zoo name. If several processes call this at once, one of them downloads.

    Raises:
        FileNotFoundError: there is neither such a file nor such a name.
        OSError: the download failed; the message says where to put the file by hand.
        UserError: the file differs from the one first recorded for the URL, or is not a checkpoint.
    """
    text = str(source)
    if text.startswith(("http://", "https://")):
        return _cached(text)
    if Path(source).is_file():
        return Path(source)
    if text in ZOO:
        return _cached(ZOO[text].url)
    hint = ""
    if not Path(text).suffix and Path(text).name == text:  # it looks like a name
        try:
            lookup(text)
        except ValueError as error:
            hint = f", and {error}"
    raise FileNotFoundError(f"no checkpoint at {source}{hint}")


def cache_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _cached(url: str) -> Path:
    name = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    if name in ("", ".", "..", LOCK):
        raise UserError(f"{url} does not end in a file name")
    path = cache_folder() / name
    if path.exists() and _is_as_recorded(url, path):  # the usual case, without a lock, so that the folder may be read-only
        return path
    if path.exists() and not os.access(path.parent, os.W_OK):
        check_format(path)
        print(f"{path} is used without comparing its SHA-256: its folder is read-only, so nothing can be recorded there", file=sys.stderr)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_process(path):
        if not path.exists():
            _download(url, path)
        elif not _is_as_recorded(url, path):
            _verify(url, path, path)
    return path


def _download(url: str, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    print(f"downloading {url} to {path}", file=sys.stderr)
    try:
        for attempt in range(1, ATTEMPTS + 1):
            before = part.stat().st_size if part.exists() else 0
            try:
                _transfer(url, part)
                break
            except HTTPError:
                raise
            except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
                arrived = part.stat().st_size if part.exists() else 0
                if attempt == ATTEMPTS or arrived <= before:
                    raise
                print(f"the connection was lost after {arrived} bytes ({_reason(error)}); resuming", file=sys.stderr)
    except (OSError, http.client.HTTPException) as error:
        kept = f"; {part.stat().st_size} bytes are kept; run the same command to resume" if part.exists() else ""
        raise OSError(f"{url} cannot be downloaded ({_reason(error)}){kept}. To do it by hand, put the file at {path}") from error
    try:
        _verify(url, part, path)
    except ValueError:
        part.unlink()
        raise
    finally:
        _note_of(part).unlink(missing_ok=True)
    os.replace(part, path)


def _transfer(url: str, part: Path) -> None:
    """Sends one request for the whole file, or for the rest if the server still has the same file.

    Raises:
        OSError, HTTPException: the request failed; ``part`` holds what has arrived, and the file beside it what is known of the whole.
    """
    note = _note_of(part)
    known = json.loads(note.read_text()) if part.exists() and note.exists() else {}
    start = part.stat().st_size if known.get("url") == url and known.get("size") else 0
    if start and start == known["size"]:
        return
    headers = {"User-Agent": "litv2", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]  # if the file has changed, the server sends all of it
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and "Range" in headers:  # the server now has a shorter file
            part.unlink()
            return _transfer(url, part)
        raise
    with response:
        start = start if response.status == 206 else 0
        size = _length(response, start)
        fresh = dict(url=url, size=size, validator=_validator(response))
        if start and fresh != known:  # the file has changed, and the server ignores If-Range
            part.unlink()
            return _transfer(url, part)
        note.write_text(json.dumps(fresh))
        bar = torch.hub.tqdm(total=size, initial=start, unit="B", unit_scale=True, unit_divisor=1024, disable=not sys.stderr.isatty())
        with open(part, "r+b" if start else "wb") as file, bar:
            file.seek(start)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            arrived = file.tell()
            file.truncate()
    if size is not None and arrived != size:
        raise ConnectionError(f"truncated: {arrived} of {size} bytes arrived")


def _length(response, start: int) -> int | None:
    """Returns the size of the whole file in bytes, None if the server does not state it."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != start:
            raise ConnectionError(f"requested the bytes from {start}, got {response.headers.get('Content-Range')!r}")
        return int(match[2])
    length = response.headers.get("Content-Length")
    return int(length) if length else None


def _validator(response) -> str:
    """Returns what distinguishes versions of the file. A weak ETag, W/"...", does not guarantee identical bytes."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _verify(url: str, file: Path, path: Path) -> None:
    """Checks the content of ``file`` against the record of ``path``, or creates the record."""
    check_format(file)
    lock = _lock()
    for other, record in lock.items():
        if other != url and record["file"] == path.name and path.exists():
            raise UserError(f"{path} is the file of {other}, not of {url}; move it away")
    digest = _sha256(file)
    known = lock.get(url)
    if known and digest != known["sha256"]:
        raise UserError(
            f"{file} is not the file that was first recorded for {url}: SHA-256 {digest} instead of {known['sha256']}, "
            f"{file.stat().st_size} bytes instead of {known['size']}. Delete it to download it again; if it is the right file, remove "
            f"the record of that URL from {cache_folder() / LOCK}"
        )
    if not known and file == path:
        print(f"{path} was put there by hand; recorded its SHA-256 {digest}", file=sys.stderr)
    _record(url, file, digest, path.name)


def _is_as_recorded(url: str, path: Path) -> bool:
    known, stat = _lock().get(url, {}), path.stat()
    return (known.get("file"), known.get("size"), known.get("mtime_ns")) == (path.name, stat.st_size, stat.st_mtime_ns)


def _lock() -> dict[str, dict]:
    path = cache_folder() / LOCK
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); correct or remove it") from error


def _record(url: str, file: Path, digest: str, name: str | None = None) -> None:
    stat = file.stat()
    with one_process(cache_folder() / LOCK):
        lock = _lock() | {url: dict(file=name or file.name, size=stat.st_size, sha256=digest, mtime_ns=stat.st_mtime_ns)}
        with atomic_write(cache_folder() / LOCK) as draft:
            draft.write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error) if not isinstance(error, HTTPError) else f"HTTP {error.code} {error.reason}"
