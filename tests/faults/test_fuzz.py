# SPDX-License-Identifier: Apache-2.0
"""The fuzzers, shortened, and what they have found."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import load_config
from data.sources import open_sources
from document_helpers import documented
from helpers import ROOT
from litv2.errors import LONGEST_MESSAGE, UserError
from litv2.preprocess import MOST_ELONGATED, decode, read_image
from tests.faults import bad_reader, fuzz
from tests.faults.bad_reader import LETTERS, OUTSIDE
from tests.faults.fuzz_readers import READERS, Reader, _data_config

QUICK = ["image: PNG", "pickle check", "checkpoint, zip", "zip data set", "configuration, YAML"]  # a process each, of a few seconds


@pytest.mark.extra
@pytest.mark.parametrize("command", documented("docs/reliability.md", r"python -m tests\.faults\.fuzz .*"), ids=str)
def test_no_findings(command, tmp_path):
    words = [str(tmp_path / "table.json") if word == "FILE" else word for word in command.words[3:]]
    assert fuzz.main([*words, "--inputs", "1500", "--only", *QUICK]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["reader"] for row in rows] == QUICK and all(row["accepted"] and row["refused"] for row in rows)


@pytest.mark.extra
def test_findings(monkeypatch, tmp_path):
    """The harness sees each thing that a reader must not do."""
    monkeypatch.setattr(fuzz, "_work", bad_reader.work)
    monkeypatch.setitem(READERS, "bad", Reader(1, 64, "input", lambda folder: ([], None, None)))
    row = fuzz.fuzz("bad", seed=0, inputs=len(LETTERS), keep=tmp_path)
    assert (row["accepted"], row["refused"], row["crashes"], row["hangs"], row["errors"]) == (1, 1, 1, 1, 5)
    found = {finding["number"]: finding["what"] for finding in row["findings"]}
    for number, words in enumerate(["KeyError: 'bare'", "ended: -6", "a second", "os.system", "memory", "writes", "code"], start=2):
        assert words in found[number]
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [bytes([letter]) for letter in LETTERS[2:]]
    assert not OUTSIDE.exists()


def test_inputs_repeat():
    """An input is a function of the seed and its number."""
    _, mutation, _ = READERS["checkpoint, zip"].prepare(Path())
    seeds = READERS["checkpoint, zip"].prepare(Path())[0]
    assert [mutation(Random(i), seeds) for i in range(20)] == [mutation(Random(i), seeds) for i in range(20)]


# What was found


def refused(function, *arguments, match: str) -> None:
    with pytest.raises(UserError, match=match):
        function(*arguments)


def test_messages_do_not_steer_a_terminal():
    error = UserError("a\x1b[2J\x00b\nc\u202e" + "x" * 10**6)
    assert str(error).startswith("a\\x1b[2J\\x00b\nc\\u202e") and len(str(error)) <= LONGEST_MESSAGE


def test_images_that_pillow_would_trust(tmp_path):
    """Of a format that starts programs; too elongated to be enlarged; and with a chunk that says that it has 2 GiB."""
    path = tmp_path / "image.png"
    Image.new("RGB", (80, 70)).save(path, format="EPS")
    refused(read_image, path, match="cannot identify image file$")
    Image.new("RGB", (MOST_ELONGATED + 1, 1)).save(path)
    refused(read_image, path, match="too elongated: one side may be 100 times the other")
    Image.new("RGB", (8, 8)).save(path)
    content = path.read_bytes()
    at = content.index(b"IDAT")
    damaged = content[: at - 4] + struct.pack(">I", 2**31 - 1) + content[at:]
    assert decode(Frugal(damaged), "RGB").size == (8, 8)
    with pytest.raises(AssertionError):
        Image.open(Frugal(damaged)).load()


class Frugal(io.BytesIO):
    """As a file, which allocates what is to be read before it reads."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is None or size <= len(self.getvalue())
        return super().read(size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TRAIN: &a {EPOCHS: *a}", "more than 20000 values"),
        ("a: &a [1, 1, 1]\n" + "".join(f"{y}: &{y} [{', '.join(9 * ['*' + x])}]\n" for x, y in zip("abcdefgh", "bcdefghi")), "values"),
        ("a: " + "[" * 3000, "more than 50 brackets within each other"),
        ("BASE: [" + "x" * 3000 + "]", "there is no configuration file"),
        ("SEED: " + "9" * 5000, "a number has 5000 digits"),
        ("SEED: 2001-99-99", "month must be in 1..12"),
        ("TAG: a\0b", "special characters are not allowed"),
        ("BASE: 5", "BASE must be a list of files, got 5"),
        ("BASE: [config.yaml]", "more than 10 deep"),
        ("TRAIN: {BASE_LR: .nan}", "TRAIN.BASE_LR must be finite, got nan"),
        ("TRAIN: {BASE_LR: 1" + "0" * 99 + "}", None),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("AMP_OPT_LEVEL: [O1]", "must be O0, O1 or O2"),
        ("#" + "x" * 300_000, "more than 262144"),
    ],
)  # fmt: skip
def test_configurations(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    if message is None:
        load_config(tmp_path / "config.yaml")
    else:
        refused(load_config, tmp_path / "config.yaml", match=message)
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    refused(load_config, tmp_path / "config.yaml", match="is not valid YAML: .*invalid start byte")


KEYS = st.sampled_from("TRAIN.EPOCHS TRAIN.BASE_LR DATA.IMG_SIZE AUG.CUTMIX_MINMAX MODEL.LIT.NUM_HEADS AMP_OPT_LEVEL TRAIN x".split())
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(ATOMS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(KEYS, VALUES | st.text()), max_size=3))
def test_options(pairs):
    """--opts with any values: a configuration of the right types, or an error of one line."""
    try:
        config = load_config(ROOT / "classification/configs/litv2-digits.yaml", [word for pair in pairs for word in pair])
        assert type(config.TRAIN.EPOCHS) is int and math.isfinite(config.TRAIN.BASE_LR)
    except UserError as error:
        assert str(error).isprintable()


@pytest.fixture
def archives(tmp_path):
    """A configuration of a data set in zip archives."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            archive.write(tmp_path / "0.png", "cat/0.png")
        (tmp_path / f"{split}_map.txt").write_text("cat/0.png\t0\n")
    return _data_config(tmp_path, ZIP_MODE=True, CACHE_MODE="full")


@pytest.mark.parametrize(
    ("listing", "message"),
    [(b"cat/0.png\t\xb2", "not a text in UTF-8"), ("cat/0.png\t²".encode(), "class number"), (b"cat/0.png\t999999999", "at most 100000")],
)
def test_listings(archives, listing, message):
    (Path(archives.DATA.DATA_PATH) / "train_map.txt").write_bytes(listing)
    refused(open_sources, archives, match=message)


def test_archives(archives, monkeypatch):
    """A damaged archive ends the run, a damaged entry is reported with the image, and no entry expands without a limit."""
    path = Path(archives.DATA.DATA_PATH) / "train.zip"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"PK\x03\x04", b"PK\x03\x05"))
    source, _ = open_sources(archives)
    with pytest.raises(zipfile.BadZipFile):
        source[0]
    path.write_bytes(whole)
    monkeypatch.setattr("data.sources.LARGEST_FILE", 10)
    source, _ = open_sources(archives)
    refused(source.__getitem__, 0, match="it has more than 0 MiB")
    path.write_bytes(whole[:-30])
    refused(open_sources, archives, match="train.zip cannot be read as a zip archive: File is not a zip file")


def test_tar_archives(tmp_path):
    config = _data_config(tmp_path, DATASET="tar")
    for content in (b"", bytes(10240), b"no archive" * 100):
        (tmp_path / "train.tar").write_bytes(content)
        refused(open_sources, config, match="train.tar cannot be read as a tar archive with CLASS/IMAGE inside")
