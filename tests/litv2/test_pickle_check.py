# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged checkpoints: each is refused at once, and none of its code runs."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from helpers import tiny_model
from litv2.weights.formats import LEGACY_MAGIC
from litv2.weights.reading import read_checkpoint

COMMAND = "touch executed"
EXPRESSION = f"__import__('os').system({COMMAND!r})"


@pytest.fixture(autouse=True)
def no_hang(tmp_path, monkeypatch):
    """Ends the process where a test hangs, also inside C code. Files land in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    faulthandler.dump_traceback_later(20, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def call(name: str, *arguments: bytes) -> bytes:
    """GLOBAL, arguments, REDUCE."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def data(content: bytes) -> bytes:
    """Bytes as protocol 2 has them."""
    return call("_codecs.encode", text(content.decode("latin1")), text("latin1"))


def protocol2(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def archive(data: bytes, records: dict[str, bytes] | None = None, **options) -> bytes:
    """A file of torch.save around this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as target:
        for name, content in {"data.pkl": data, "byteorder": b"little", **(records or {}), "version": b"3\n"}.items():
            target.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def legacy(content: bytes, keys: list[str] = (), storages: bytes = b"") -> bytes:
    """The same as torch wrote it before version 1.6."""
    head = [LEGACY_MAGIC, 1001, dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4))]
    return b"".join(pickle.dumps(part, 2) for part in head) + content + pickle.dumps(list(keys), 2) + storages


def storage(key: str, count: int, kind: str = "torch.FloatStorage", view: bytes = b"") -> bytes:
    module, _, name = kind.rpartition(".")
    return b"(" + text("storage") + f"c{module}\n{name}\n".encode() + text(key) + text("cpu") + number(count) + view + b"tQ"


def tensor(store: bytes, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    sizes = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride)]
    return call("torch._utils._rebuild_tensor_v2", store, b"K\x00", *sizes, b"\x89", call("collections.OrderedDict"))


def doubled_tuple(depth: int) -> bytes:
    """A tuple of two references to a tuple of two references to ...: 2 ** depth elements when written out."""
    return b")" + b"q\x00h\x00\x86" * depth


# Pickles that run a command when they are unpickled without care; a test below shows that they do.
CODE = {
    "os.system": protocol2(call("os.system", text(COMMAND))),
    "posix.system": protocol2(call("posix.system", text(COMMAND))),
    "builtins.eval": protocol2(call("builtins.eval", text(EXPRESSION))),
    "builtins.exec": protocol2(call("builtins.exec", text(EXPRESSION))),
    "names of Python 2": protocol2(call("__builtin__.eval", text(EXPRESSION))),
    "subprocess": protocol2(call("subprocess.check_call", b"]" + text("touch") + b"a" + text("executed") + b"a")),
    "getattr chain": protocol2(
        call("builtins.getattr", call("builtins.__import__", text("os")), text("system")) + b"(" + text(COMMAND) + b"tR"
    ),
    "attrgetter": protocol2(
        call("operator.attrgetter", text("system")) + b"(" + call("importlib.import_module", text("os")) + b"tR(" + text(COMMAND) + b"tR"
    ),
    "nested reduce": protocol2(call("builtins.list", call("builtins.map", b"cos\nsystem\n", b"]" + text(COMMAND) + b"a"))),
    "a pickle in a pickle": protocol2(call("pickle.loads", data(protocol2(call("os.system", text(COMMAND)))))),
    "torch's own loader": protocol2(call("torch.storage._load_from_bytes", data(legacy(protocol2(call("os.system", text(COMMAND))))))),
    "as a value": protocol2(b"}" + text("model") + call("os.system", text(COMMAND)) + b"s"),
    "as a key": protocol2(b"}" + call("os.system", text(COMMAND)) + text("model") + b"s"),
    "and thrown away": protocol2(call("os.system", text(COMMAND)) + b"0}"),
    "in a persistent id": protocol2(b"(" + call("os.system", text(COMMAND)) + b"t0}"),
    "instance": b"(" + text(COMMAND) + b"ios\nsystem\n.",
    "object": b"(cos\nsystem\n" + text(COMMAND) + b"o.",
    "new object": protocol2(b"cfunctools\npartial\ncos\nsystem\n\x85\x81(" + text(COMMAND) + b"tR"),
    "protocol 0": b"cos\nsystem\n(V" + COMMAND.encode() + b"\ntR.",
    "protocol 4": pickle.dumps(type("Hostile", (), {"__reduce__": lambda self: (eval, (EXPRESSION,))})(), 4),
    "global of memoised strings": b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x01h\x00\x93(" + text(COMMAND) + b"tR.",
    "global of a changed memo": b"\x80\x04\x8c\x06linear\x94\x8c\x02os\x94\x8c\x06systemq\x00h\x01h\x00\x93(" + text(COMMAND) + b"tR.",
    "state of a class": protocol2(b"cfractions\nFraction\n)\x81}" + text("x") + call("os.system", text(COMMAND)) + b"sb"),
}  # fmt: skip

# The globals that are refused by their name.
ASKED = """os.system posix.system builtins.eval builtins.exec subprocess.check_call builtins.getattr operator.attrgetter builtins.list
pickle.loads torch.storage._load_from_bytes functools.partial fractions.Fraction""".split()

# Pickles that make an unpickler work for ever, ask for all memory, or reach what they should not.
GREEDY = {
    "exponential key": protocol2(b"}" + doubled_tuple(60) + text("value") + b"s"),
    "exponential value": protocol2(b"}" + text("a") + doubled_tuple(60) + b"s"),
    "exponential element of a set": protocol2(call("builtins.set", b"]" + doubled_tuple(60) + b"a")),
    "exponential key among attributes": protocol2(call("collections.OrderedDict") + b"]" + doubled_tuple(40) + text("x") + b"\x86ab"),
    "deep key": protocol2(b"}N" + b"\x85" * 200_000 + text("value") + b"s"),
    "deep value": protocol2(b"}" + text("a") + b"N" + b"\x85" * 200_000 + b"s"),
    "colliding keys": protocol2(b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1000)) + b"u"),
    "many tuples as keys": protocol2(b"}(" + b"".join(number(i) + number(i) + b"\x86N" for i in range(9000)) + b"u"),
    "colliding complex keys": protocol2(b"}" + call("builtins.complex", b"K\x01", b"K\x02") + b"Ns"),
    "memo": protocol2(b"}r\xff\xff\xff\xff"),
    "bytearray": protocol2(call("builtins.bytearray", number(10**12))),
    "tensor of any size": protocol2(call("torch.FloatTensor", number(10**12))),
    "storage of any size": protocol2(call("torch.storage.UntypedStorage", number(10**12))),
    "new tensor": protocol2(b"ctorch\nTensor\n" + number(10**12) + b"\x85\x81"),
    "storage beyond its record": protocol2(b"}" + text("a") + tensor(storage("0", 10**12), (4,), (1,)) + b"s"),
    "storage of no record": protocol2(b"}" + text("a") + tensor(storage("../1", 4), (4,), (1,)) + b"s"),
    "expanded tensor": protocol2(b"}" + text("a") + tensor(storage("0", 4), (10**6, 10**6), (0, 0)) + b"s"),
    "tensor beyond its storage": protocol2(b"}" + text("a") + tensor(storage("0", 4), (5,), (1,)) + b"s"),
    "quadratic codec": protocol2(call("_codecs.encode", text("a" * 10_000), text("idna"))),
    "ever copied dictionary": protocol2(b"}q\x00" + call("collections.OrderedDict", b"h\x00")),
    "ever copied counter": protocol2(call("collections.Counter", b"}(" + b"".join(number(i) + b"N" for i in range(2000)) + b"u")),
    "counter of letters": protocol2(call("collections.Counter", text("letters"))),
    "hidden methods": protocol2(call("collections.OrderedDict") + b"N}" + text("items") + b"K\x05s\x86b"),
    "persistent id of another kind": protocol2(text("module") + b"ccollections\nOrderedDict\n" + text("f") + text("s") + b"\x86\x86\x86Q"),
    "persistent id that is text": protocol2(text("0") + b"Q"),
    "text persistent id": b"P0\n.",
    "extension": protocol2(b"\x82\x01"),
    "byte array opcode": b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b".",
    "string beyond the end": protocol2(b"X\xff\xff\xff\xff"),
    "class of another library": protocol2(b"cnumpy\nndarray\n)\x81"),
    "empty stack": protocol2(b"R"),
    "no mark": protocol2(b"t"),
    "no such memo": protocol2(b"h\x07"),
    "state of nothing": protocol2(b"]}b"),
    "key of a list": protocol2(b"}]Ns"),
    "items in a list": protocol2(b"](K\x01K\x02u"),
    "no stop": b"\x80\x02}",
    "global of numbers": b"\x80\x04K\x01K\x02\x93.",
    "configuration in a tuple": protocol2(b"cyacs.config\nCfgNode\n)\x81\x85"),
}  # fmt: skip


def refused(content: bytes, match: str | None = None) -> str:
    Path("bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        read_checkpoint("bad.pth")
    assert "bad.pth" in str(error.value)
    assert not Path("executed").exists()
    return str(error.value)


@pytest.mark.parametrize("wrap", [archive, legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", [*CODE, *GREEDY])
def test_hostile_pickles(name, wrap):
    body = (CODE | GREEDY)[name]
    content = archive(body, {"data/0": bytes(16)}) if wrap is archive else legacy(body, ["0"] if b"storage" in body else [], bytes(24))
    message = refused(content)
    if name in CODE and body.startswith(b"\x80") and "global" in message:
        assert any(repr(asked) in message for asked in ASKED), message
    if name in ("quadratic codec", "bytearray", "tensor of any size", "ever copied dictionary"):
        # refused by name or arguments, not by what the call led to
        assert "not allowed in a checkpoint" in message or "unexpected arguments" in message
    if name in CODE and (name == "os.system" or name.startswith("global of")):
        assert "'os.system'" in message


def test_what_runs_code_would_do_so():
    """The pickles above are what they say: each leaves its mark in an unpickler without care."""
    code = """if True:
        import pickle, sys, pathlib, warnings
        warnings.simplefilter("ignore")
        mark = pathlib.Path("executed")
        for name, data in pickle.load(open("payloads", "rb")).items():
            try:
                pickle.loads(data)
            except Exception as error:
                pass
            print(name if mark.exists() else f"HARMLESS {name}")
            mark.unlink(missing_ok=True)
    """
    payloads = {name: data for name, data in CODE.items() if name != "torch's own loader"}  # torch guards that one by now
    Path("payloads").write_bytes(pickle.dumps(payloads))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(payloads)


GOOD = io.BytesIO()
torch.save({"model": tiny_model().state_dict(), "epoch": 3, "config": OrderedDict(a=[1, (2, 3)])}, GOOD)


@pytest.mark.parametrize("part", [*(i / 12 for i in range(12)), "last byte", "last record"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_truncated(part, old):
    content = GOOD.getvalue()
    if old:
        buffer = io.BytesIO()
        torch.save({"model": tiny_model().state_dict()}, buffer, _use_new_zipfile_serialization=False)
        content = buffer.getvalue()
    end = {"last byte": len(content) - 1, "last record": len(content) - 200}.get(part)
    refused(content[: int(part * len(content)) if end is None else end])


def test_damaged_byte_by_byte():
    """A byte that is not the right one anywhere in the pickle is an error or harmless, never another exception."""
    content = GOOD.getvalue()
    start = content.index(b"\x80\x02")
    for position in range(start, start + 1500, 17):
        for value in (0, 46, 255):
            changed = bytearray(content)
            changed[position] = value
            Path("bad.pth").write_bytes(changed)
            with contextlib.suppress(ValueError):
                read_checkpoint("bad.pth")


def test_other_files():
    good = GOOD.getvalue()
    refused(b"", "empty")
    refused(b"<!DOCTYPE html><html>404</html>", "web page")
    refused(b"\n <html>404</html>", "web page")
    refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull")
    refused(b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG")
    refused(b"PK\x03\x05" + good[4:], "neither")
    refused(pickle.dumps({"model": 1}), "not one written by torch.save")
    refused(good + b"appended", "no central directory at its end")
    refused(archive(protocol2(b"]")), "contains a list")
    refused(archive(protocol2(b"K\x05")), "contains a int")


def test_zip_archives():
    data = protocol2(b"}")
    refused(archive(data, {"data/0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED), "compressed")
    method = bytearray(archive(data))
    method[method.index(b"PK\x01\x02") + 10] = zipfile.ZIP_DEFLATED
    refused(bytes(method), "compressed")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = io.BytesIO()
        with zipfile.ZipFile(twice, "w") as target:
            target.writestr("archive/data.pkl", data)
            target.writestr("archive/data.pkl", CODE["os.system"])
    refused(twice.getvalue(), "data.pkl' more than once")

    content = archive(data, {"data/0": bytes(1000)})
    directory = content.index(b"PK\x01\x02")
    for offset, message in ((20, None), (24, "compressed|encrypted"), (42, None)):  # sizes and place in the first entry of the directory
        changed = bytearray(content)
        struct.pack_into("<I", changed, directory + offset, 10**9)
        refused(bytes(changed), message)
    both = bytearray(content)
    struct.pack_into("<II", both, directory + 20, 10**9, 10**9)
    refused(bytes(both), "beyond the end")
    overlapping = bytearray(archive(data, {f"data/{i}": bytes(4000) for i in range(4)}))
    entry = overlapping.index(b"PK\x01\x02")
    first = None
    while (entry := overlapping.find(b"PK\x01\x02", entry + 1)) > 0:
        if b"data/" in overlapping[entry + 46 : entry + 60] and b"pkl" not in overlapping[entry + 46 : entry + 66]:
            first = first or bytes(overlapping[entry + 42 : entry + 46])
            overlapping[entry + 42 : entry + 46] = first
            struct.pack_into("<II", overlapping, entry + 20, 12_000, 12_000)
    refused(bytes(overlapping), "overlap")

    refused(archive(data, {"constants.pkl": b"", "code/a.py": b"import os"}), "TorchScript")
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as target:
        target.writestr("archive/readme.txt", "hello")
    refused(other.getvalue(), "no data.pkl")
    with zipfile.ZipFile(other, "a") as target:
        target.writestr("elsewhere/data.pkl", data)
    refused(other.getvalue(), "more than one folder")


def test_legacy_files():
    refused(legacy(protocol2(b"}"), ["0"]), "storages")
    one = protocol2(b"}" + text("a") + tensor(storage("0", 4, view=b"N"), (4,), (1,)) + b"s")
    Path("good.pth").write_bytes(legacy(one, ["0"], struct.pack("<q4f", 4, 1, 2, 3, 4)))
    assert read_checkpoint("good.pth")["a"].tolist() == [1, 2, 3, 4]
    refused(legacy(one, [], struct.pack("<q4f", 4, 1, 2, 3, 4)), "storages")  # its memory would be read as it happens to be
    refused(legacy(one, ["0"], bytes(8)), "truncated")
    refused(legacy(one.replace(number(4), number(10**12), 1), ["0"], bytes(100)), "more than there are")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as target:
        name = tarfile.TarInfo(legacy(b"")[:14].decode("latin1"))
        name.size = 0
        target.addfile(name)
    header = bytearray(tar.getvalue())
    header[:14] = legacy(b"")[:14]
    refused(bytes(header), "tar archive")


def test_safetensors_files():
    safetensors = pytest.importorskip("safetensors.torch")
    good = safetensors.save({"a": torch.arange(4.0)})
    Path("good").write_bytes(good)
    assert read_checkpoint("good")["model"]["a"].tolist() == [0, 1, 2, 3]
    refused(good[:-1])
    refused(good[:20], "truncated")
    refused(struct.pack("<Q", 10**12) + good[8:], "truncated")
    refused(good.replace(b'"F32"', b'"Q32"'))
    refused(good.replace(b"[4]", b"[9]"))
    refused(struct.pack("<Q", 2) + b"{}" + bytes(10))


def test_what_the_release_and_we_write_passes():
    """Tensors of every kind that a checkpoint has, views, shared and empty ones, and configurations in each other."""
    base = torch.arange(12.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.nn.Parameter(base)], lr=1.0), [8, 11])
    content = dict(
        schedule=schedule.state_dict(),
        model=OrderedDict(a=base, b=base[3:], c=base.view(3, 4).t(), empty=torch.zeros(0, 3), scalar=torch.tensor(2)),
        kinds=[
            torch.zeros(2, dtype=kind) for kind in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64)
        ],
        parameter=torch.nn.Parameter(base),
        size=base.shape,
        plain=[
            None,
            True,
            3,
            -(10**30),
            2.5,
            "text",
            (1, (2, "a")),
            {1: {"x": []}},
            {(1, 2): 3},
            set(),
            torch.device("cpu"),
            torch.float32,
        ],
        data=b"\x00\xff",
        optimizer=torch.optim.AdamW([torch.nn.Parameter(base)]).state_dict(),
    )
    for new in (False, True):
        if new:  # the old format cannot hold these
            content["newer"] = [torch.zeros(2, dtype=kind) for kind in (torch.uint16, torch.float8_e4m3fn)]
        torch.save(content, "good.pth", _use_new_zipfile_serialization=new)
        again = read_checkpoint("good.pth")
        assert again.keys() == content.keys() and again["plain"] == content["plain"] and again["data"] == content["data"]
        assert type(again["schedule"]["milestones"]) is Counter and again["schedule"] == content["schedule"]
        assert all(torch.equal(again["model"][key], value) for key, value in content["model"].items())
        assert again["model"]["a"].untyped_storage().data_ptr() == again["model"]["b"].untyped_storage().data_ptr()
    assert [value.dtype for value in again["newer"]] == [torch.uint16, torch.float8_e4m3fn]


def test_configuration_becomes_a_dictionary():
    """Wherever the release's class stands, however it is shared, in cycles too; its attributes do not come along."""
    yacs = pytest.importorskip("yacs.config")
    config = yacs.CfgNode(dict(DATA=dict(SIZE=224), LIST=[1, 2]))
    config["SAME"] = inner = config["DATA"]
    config.freeze()
    loop: dict = {"config": config, "list": [config, {"deep": inner}]}
    loop["list"].append(loop["list"])
    torch.save(loop, "config.pth")
    again = read_checkpoint("config.pth")
    assert type(again["config"]) is dict and again["config"] == {"DATA": {"SIZE": 224}, "SAME": {"SIZE": 224}, "LIST": [1, 2]}
    assert type(again["config"]["DATA"]) is dict and again["config"]["DATA"] is again["config"]["SAME"] is again["list"][1]["deep"]
    assert again["list"][0] is again["config"] and again["list"][2] is again["list"]
    shared = nested = yacs.CfgNode()
    for _ in range(60):  # 2 ** 60 configurations when written out
        nested["LEFT"] = nested["RIGHT"] = nested = yacs.CfgNode()
    torch.save({"config": shared}, "shared.pth")
    assert type(read_checkpoint("shared.pth")["config"]["LEFT"]["RIGHT"]) is dict
    torch.save(config, "bare.pth")
    assert type(read_checkpoint("bare.pth")) is dict


def test_attributes_hide_no_methods():
    """A dictionary whose ``items`` is a number in the file works all the same."""
    body = call("collections.OrderedDict") + text("model") + b"}s}" + text("items") + b"K\x05s" + text("keys") + b"K\x05sb"
    Path("good.pth").write_bytes(archive(protocol2(body)))
    content = read_checkpoint("good.pth")
    assert list(content.items()) == [("model", {})]
