# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints of all formats safely and loading them strictly."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import pytest
import torch

from helpers import SHARED, TINY, fill, max_difference, shared, tiny_model
from litv2 import LITv2
from litv2.weights.reading import read_checkpoint
from litv2.weights.state_dict import find_weights, load_weights


def test_release_format():
    """The release's classification file, with its pickled CfgNode, loads strictly."""
    checkpoint = read_checkpoint(shared("golden/classification_format.pth"))
    assert checkpoint["epoch"] == 299 and checkpoint["config"]["MODEL"]["NUM_CLASSES"] == 1000
    model = LITv2(**TINY)
    assert load_weights(model, find_weights(checkpoint)) == []
    expected = tiny_model().state_dict()
    assert all(max_difference(value, expected[name]) < 1e-6 for name, value in model.state_dict().items() if value.is_floating_point())


def test_detection_format():
    weights = find_weights(read_checkpoint(shared("golden/detection_format.pth")))
    model = fill(LITv2(**{**TINY, "num_classes": 0}))
    own = model.state_dict()
    norms = {name: weights.pop(name) for name in list(weights) if name.startswith(("norm1", "norm2", "norm3"))}
    assert len(norms) == 6
    assert {name: value.shape for name, value in weights.items()} == {k: v.shape for k, v in own.items() if not k.startswith("norm.")}
    assert all(max_difference(value, own[name]) < 1e-6 for name, value in weights.items() if value.is_floating_point())


@pytest.mark.parametrize("wrap", ["{}", "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "backbone.{}"])
@pytest.mark.parametrize("entry", [None, "model", "state_dict", "ema"])
def test_wrappings(wrap, entry, tmp_path):
    model = tiny_model()
    weights = {wrap.format(name): value for name, value in model.state_dict().items()}
    if wrap.startswith("backbone"):
        weights["neck.weight"] = torch.zeros(3)
    content = (
        weights if entry is None else {entry: weights, "epoch": 3, "model": weights if entry == "model" else {"other": torch.zeros(1)}}
    )
    if entry == "state_dict":
        del content["model"]
    torch.save(content, tmp_path / "file.pth")
    found = find_weights(read_checkpoint(tmp_path / "file.pth"))
    assert found.keys() == model.state_dict().keys()


def test_strict():
    model = LITv2(**TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = tiny_model().state_dict()
    weights["stray"] = torch.zeros(2)
    weights["norm.bias"] = torch.zeros(5)
    del weights["patch_embed.proj.bias"]
    with pytest.raises(ValueError) as error:
        load_weights(model, weights)
    message = str(error.value)
    assert "missing (1): patch_embed.proj.bias" in message and "unexpected (1): stray" in message
    assert "norm.bias (5,) instead of (256,)" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing may be half loaded"


def test_another_variant_is_an_error():
    with pytest.raises(ValueError, match="another variant"):
        load_weights(LITv2(**TINY), tiny_model(alpha=0.5).state_dict())


def test_new_head():
    weights = tiny_model().state_dict()
    model = LITv2(**{**TINY, "num_classes": 7})
    head = model.head.weight.clone()
    with pytest.raises(ValueError, match="head.weight"):
        load_weights(model, weights)
    notes = load_weights(model, weights, new_heads=("head",))
    assert len(notes) == 1 and "10 outputs" in notes[0] and "7" in notes[0]
    assert torch.equal(model.head.weight, head) and torch.equal(model.norm.weight, weights["norm.weight"])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def _bytes(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["hostile", "plain pickle", "truncated", "empty", "text", "not a dictionary", "object"])
def test_bad_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = _bytes({"model": tiny_model().state_dict()})
    content = {
        "hostile": _bytes({"model": {"a": torch.zeros(1)}, "config": Hostile()}),
        "plain pickle": pickle.dumps(Hostile()),
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "not a dictionary": _bytes([torch.zeros(1)]),
        "object": _bytes({"config": io.BytesIO()}),
    }[name]
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match="bad.pth"):
        read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


def test_hostile_file_in_the_release_format(tmp_path, monkeypatch):
    """A published file whose configuration's class is exchanged for a function."""
    monkeypatch.chdir(tmp_path)
    source = zipfile.ZipFile(SHARED / "golden/classification_format.pth") if shared("golden/classification_format.pth") else None
    with zipfile.ZipFile("bad.pth", "w") as target:
        for entry in source.namelist():
            data = source.read(entry)
            if entry.endswith("data.pkl"):
                assert b"cyacs.config\nCfgNode\n" in data
                data = data.replace(b"cyacs.config\nCfgNode\n", b"cposix\nsystem\n")
            target.writestr(entry, data)
    with pytest.raises(ValueError, match="bad.pth"):
        read_checkpoint(tmp_path / "bad.pth")


def test_missing_file_and_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="no weights.*epoch"):
        find_weights({"epoch": 3})


@pytest.mark.parametrize("shortage", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_no_damage(shortage, tmp_path, monkeypatch):
    def refuse(*_, **__) -> None:
        raise shortage

    torch.save({"model": {}}, tmp_path / "file.pth")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(type(shortage), check=lambda error: error is shortage):
        read_checkpoint(tmp_path / "file.pth")


def test_a_lack_of_file_handles_is_no_damage(tmp_path):
    """A run that took it for damage would go on from an older checkpoint."""
    resource = pytest.importorskip("resource")
    torch.save({"model": {}}, tmp_path / "file.pth")
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            read_checkpoint(tmp_path / "file.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read_checkpoint(tmp_path / "file.pth") == {"model": {}}
