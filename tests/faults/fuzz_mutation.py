# SPDX-License-Identifier: Apache-2.0
"""Damages valid files: bit flips, splices, repeated blocks, extreme numbers; and changes within a file's structure, after which its
checksums and lengths still hold, so that the damage reaches what lies behind them.

A mutation is a function of a random number generator and of valid files, and returns the content of a damaged one.
"""

from __future__ import annotations

import copy
import io
import json
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import yaml

__all__ = ["Mutation", "changed_tree", "damaged", "in_json", "in_pickle", "in_png", "in_safetensors", "in_tar", "in_text", "in_yaml"]
__all__ += ["in_zip"]

Mutation = Callable[[Random, Sequence[bytes]], bytes]

LARGEST = 1 << 17  # bytes of a damaged file at most
EXTREMES = [0, 1, 2**7 - 1, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
WORDS = """& * ! - : ? , [ ] { } " ' # % | > ~ null .nan .inf -1 1e999 1e-400 0x7fffffff 99999999999999999999 true no 2001-99-99 12:30:45
&a *a <<: !!binary !!set !!timestamp !!python/object/apply:os.system ../ / NaN Infinity -Infinity e E . \\u0000 \\ud800""".split()
WORDS += ["\0", "\x1b[2J", "é", "\ud7ff", "\n", "\t", " " * 40, "9" * 5000, "[" * 3000, "{a: " * 1000, "\ufeff", "\u2028"]
GLOBALS = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"ctorch\nTensor\n", b"ccollections\nCounter\n"]

OPCODES = [b"R", b"b", b"\x81", b"Q", b"t", b")", b"}", b"]", b"(", b"0", b"2", b"q\x00", b"h\x00"]


def damaged(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Of any format: one to sixteen damages to its bytes."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 2, 4, 8, 16))):
        _damage(random, data, seeds)
    return bytes(data[:LARGEST])


def _damage(random: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at, length = random.randrange(len(data) + 1), random.choice((1, 2, 4, 8, 16, 64, 512))
    kind = random.randrange(9)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << random.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
    elif kind == 2:  # a number in any byte order: a length, a size, an offset
        width = random.choice((1, 2, 4, 8))
        value = random.choice(EXTREMES) % (1 << 8 * width)
        data[at : at + width] = value.to_bytes(width, random.choice(("little", "big")))
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        data[at:at] = random.randbytes(length)
    elif kind == 5:
        data[at:at] = data[at : at + length] * random.choice((1, 2, 10, 100))
    elif kind == 6:
        other = random.choice(seeds)
        start = random.randrange(len(other) + 1)
        data[at : at + length] = other[start : start + random.choice((length, len(other)))]
    elif kind == 7:
        del data[at:]
    else:
        there = random.randrange(len(data) + 1)
        data[at : at + length], data[there : there + length] = data[there : there + length], data[at : at + length]


def in_text(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Of a text: numbers, words and lines are replaced, repeated and left out; now and then bytes are damaged."""
    if random.random() < 0.2:
        return damaged(random, seeds)
    text = random.choice(seeds).decode(errors="replace")
    for _ in range(random.choice((1, 1, 2, 4))):
        kind, found = random.randrange(4), list(re.finditer(r"\d+|\w+|[^\w\s]", text))
        first = random.choice(found) if found else None
        start, end = first.span() if first else (0, 0)
        lines = text.splitlines(keepends=True) or [""]
        if kind == 0:
            text = text[:start] + random.choice((str(random.choice(EXTREMES)), random.choice(WORDS))) + text[end:]
        elif kind == 1:
            text = text[:start] + random.choice(WORDS) + text[start:]
        elif kind == 2:
            lines[random.randrange(len(lines))] *= random.choice((0, 2, 50))
            text = "".join(lines)
        else:
            random.shuffle(lines)
            text = "".join(lines)
    return text.encode(errors="surrogatepass")[:LARGEST]


def changed_tree(random: Random, tree: Any) -> Any:
    """Returns a copy of nested dictionaries and lists in which a few entries are replaced, moved, repeated or left out."""
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return _value(random)
        holder, key = random.choice(places)
        kind = random.randrange(6)
        if kind == 0:
            holder[key] = _value(random)
        elif kind == 1 and isinstance(holder[key], (int, float)):
            holder[key] = random.choice((*EXTREMES, -1, -(2**63), 0.5, 1e308, float("nan"), float("inf")))
        elif kind == 2:
            del holder[key]
        elif kind == 3:
            other, there = random.choice(places)
            with_moved = other[there] if there in range(len(other)) or isinstance(other, dict) and there in other else None
            holder[key] = copy.deepcopy(with_moved)
        elif kind == 4 and isinstance(holder, list):
            holder.extend([holder[key]] * random.choice((1, 2, 100)))
        else:
            for _ in range(random.choice((1, 10, 90))):
                holder[key] = [holder[key]]
    return tree


def _places(tree: Any):
    pending = [tree]
    while pending:
        holder = pending.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ():
            yield holder, key
            pending.append(holder[key])


def _value(random: Random) -> Any:
    numbers = None, True, 0, -1, 2**31, 2**63, 10**400, 1.5, float("nan")
    texts = "", "a", "../../etc/passwd", "\0", "é" * 300
    return random.choice((*numbers, *texts, [], {}, [[]], [0] * 100, {"": None}, {"a": {"a": 1}}))


def in_json(random: Random, seeds: Sequence[bytes]) -> bytes:
    if random.random() < 0.3:
        return in_text(random, seeds)
    return json.dumps(changed_tree(random, json.loads(random.choice(seeds)))).encode()[:LARGEST]


def in_yaml(random: Random, seeds: Sequence[bytes]) -> bytes:
    if random.random() < 0.5:
        return in_text(random, seeds)
    tree = changed_tree(random, yaml.load(random.choice(seeds), yaml.CSafeLoader))
    return yaml.dump(tree, Dumper=yaml.CSafeDumper, allow_unicode=True).encode()[:LARGEST]


def in_safetensors(random: Random, seeds: Sequence[bytes]) -> bytes:
    if random.random() < 0.3:
        return damaged(random, seeds)
    data = random.choice(seeds)
    (length,) = struct.unpack("<Q", data[:8])
    header = in_json(random, [data[8 : 8 + length]])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def in_pickle(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Opcodes are left out, repeated, exchanged and given other arguments."""
    if random.random() < 0.2:
        return damaged(random, seeds)
    codes = _opcodes(random.choice(seeds))
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(1, len(codes))
        kind = random.randrange(6)
        if kind == 0:
            del codes[at : at + random.choice((1, 1, 2, 8))]
        elif kind == 1:
            codes[at:at] = codes[at : at + random.choice((1, 2, 8))] * random.choice((1, 2, 30))
        elif kind == 2:
            there = random.randrange(1, len(codes))
            codes[at], codes[there] = codes[there], codes[at]
        elif kind == 3:
            codes.insert(at, random.choice((*GLOBALS, *OPCODES)))
        elif kind == 4:
            code = bytearray(codes[at])
            _damage(random, code, seeds)
            codes[at] = bytes(code)
        else:
            codes.insert(at, random.choice(_opcodes(random.choice(seeds))[1:]))
        if len(codes) < 2:
            break
    return b"".join(codes)[:LARGEST]


def _opcodes(data: bytes) -> list[bytes]:
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)])]


def in_zip(inside: Callable[[str], Mutation]) -> Mutation:
    """Of an archive; ``inside`` chooses the mutation of an entry by its name."""

    def mutated(random: Random, seeds: Sequence[bytes]) -> bytes:
        if random.random() < 0.3:
            return damaged(random, seeds)
        with zipfile.ZipFile(io.BytesIO(random.choice(seeds))) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
        at = random.randrange(len(entries))
        name, content = entries[at]
        kind = random.random()
        if kind < 0.8:
            entries[at] = name, inside(name)(random, [content])
        elif kind < 0.87:
            del entries[at]
        elif kind < 0.94:
            entries.append((random.choice((name, "../" + name, name + "\0", "a/" * 50 + name, "")), content))
        else:
            entries[at] = name, content + bytes(random.choice((1, 1000, 10**6)))
        method = zipfile.ZIP_DEFLATED if random.random() < 0.1 else zipfile.ZIP_STORED
        return _archive(entries, method)

    return mutated


def _archive(entries: list[tuple[str, bytes]], method: int) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def in_png(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Chunks are damaged, repeated, exchanged; their lengths and checksums are right. Other formats have no checksums: see ``damaged``."""
    data = random.choice(seeds)
    if not data.startswith(b"\x89PNG") or random.random() < 0.2:
        return damaged(random, seeds)
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(random.choice((1, 1, 2, 4))):
        i, j = random.randrange(len(chunks)), random.randrange(len(chunks))
        kind, content = chunks[i]
        choice = random.randrange(5)
        if choice == 0 and kind == b"IHDR":
            fields = list(struct.unpack(">IIBBBBB", content))
            field = random.randrange(7)
            fields[field] = random.choice(EXTREMES) % (2**32 if field < 2 else 2**8)
            chunks[i] = kind, struct.pack(">IIBBBBB", *fields)
        elif choice == 1 and kind == b"IDAT":
            chunks[i] = kind, zlib.compress(damaged(random, [zlib.decompress(content) if content[:1] == b"x" else content]))
        elif choice == 2:
            chunks[i], chunks[j] = chunks[j], chunks[i]
        elif choice == 3:
            chunks[i:i] = [chunks[j]] * random.choice((1, 2, 50))
        else:
            names = kind, b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fdAT", random.randbytes(4)
            name = random.choice(names)
            chunks[i] = name, damaged(random, [content or b"a"])
        if not chunks:
            break
    body = [struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks]
    return data[:8] + b"".join(body)[:LARGEST]


def in_tar(random: Random, seeds: Sequence[bytes]) -> bytes:
    """The checksums of the headers are right."""
    data = bytearray(damaged(random, seeds))
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)
