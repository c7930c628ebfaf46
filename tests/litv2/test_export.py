# SPDX-License-Identifier: Apache-2.0
"""Exports, run in their runtimes: the numbers are the model's, and a graph whose numbers are not is refused.

The models have the golden fill: every parameter, offsets included, is large, so that a wrong graph cannot hide.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from command_helpers import put_download, run_here
from document_helpers import documented
from helpers import ROOT, TINY, max_difference, normal, tiny_model, write_images
from litv2 import LITv2, litv2_small
from litv2.export import FORMATS, Network, ParityError, Settings, classifier, export, load, pyramid, suffix

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.extra

SMALL = dict(depths=(1, 1, 1, 1))
SIZES = [(1, 64, 96), (3, 65, 111), (5, 80, 72)]  # batch, height, width


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Exports of this file, each made once, and a folder of images."""
    folder = tmp_path_factory.mktemp("export")
    write_images(folder / "images", {"a": 12, "b": 12}, size=80)
    return folder


def exported(folder: Path, format: str, **settings) -> tuple[Path, dict]:
    path = folder / (format + "".join(f"-{value}".replace("'", "") for value in settings.values()) + suffix(format))
    if not path.exists():
        export(classifier(tiny_model(**SMALL)), format, path, Settings(image_size=(64, 96), images=folder / "images", **settings))
    return path, json.loads(path.with_name(path.name + ".parity.json").read_text())


def run_command(*arguments, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "litv2", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, **kwargs)


@pytest.mark.parametrize("format", ["torch-export", "onnx", "onnx-standard", "openvino"])
@torch.no_grad()
def test_any_batch_and_size(format, folder):
    if format == "openvino":
        pytest.importorskip("openvino")
    path, report = exported(folder, format)
    run, model = load(format, path), tiny_model(**SMALL).eval()
    for seed, (batch, height, width) in enumerate(SIZES):
        images = normal(seed, batch, 3, height, width)
        (logits,) = run(images)
        assert max_difference(logits, model(images)) < 1e-4, (batch, height, width)
    assert report["passed"] and report["tolerance"] == 1e-4 and {row["output"] for row in report["rows"]} == {"logits"}
    kinds = {" ".join(row["inputs"].split()[:2]) for row in report["rows"]}
    assert kinds == {"1 random", "3 random", "5 random", "24 real"}
    assert all(row["agreement"] == 1.0 for row in report["rows"])
    assert not [file for file in folder.iterdir() if file.name.startswith(".")], "drafts must not stay"


def test_graphs_are_what_they_say(folder):
    node, standard = (onnx.load(exported(folder, format)[0]) for format in ("onnx", "onnx-standard"))
    assert [opset.version for opset in node.opset_import if opset.domain == ""] == [19]
    assert [opset.version for opset in standard.opset_import if opset.domain == ""] == [17]
    operators = {entry.op_type for entry in node.graph.node}
    assert sum(entry.op_type == "DeformConv" for entry in node.graph.node) == 3 and "BatchNormalization" not in operators
    from litv2.export.tensorrt import unsupported_operators

    assert unsupported_operators(standard) == [] and unsupported_operators(node) == ["DeformConv"]
    for model in (node, standard):
        assert not any(entry.domain for entry in model.graph.node)
        (images,) = model.graph.input
        dims = images.type.tensor_type.shape.dim
        assert images.name == "images" and [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]


@torch.no_grad()
def test_fixed_size_and_half_precision(folder):
    path, report = exported(folder, "onnx", dynamic=(), dtype="float16", batch_size=3)
    assert report["dtype"] == "float16" and all(row["inputs"].split()[0] in ("3", "24") for row in report["rows"])
    images = normal(0, 3, 3, 64, 96)
    (logits,) = load("onnx", path)(images)
    exact = tiny_model(**SMALL).eval()(images)
    assert logits.dtype == torch.float16 and max_difference(logits, exact) < 2e-2 * max(1, exact.abs().max())
    assert path.stat().st_size < 0.6 * exported(folder, "onnx")[0].stat().st_size
    with pytest.raises(Exception, match="images"):
        load("onnx", path)(normal(0, 2, 3, 64, 96))


def calm_model() -> LITv2:
    """Newly initialised, with small offsets: the golden fill's make the model so chaotic that rounding anything changes all."""
    model = LITv2(**{**TINY, **SMALL})
    for stage in model.layers[:-1]:
        nn.init.normal_(stage.downsample.dconv.conv_offset.weight, std=0.02)
    return model


def test_int8(folder):
    path = folder / "int8.onnx"
    report = export(classifier(calm_model()), "onnx-standard", path, Settings((64, 96), 4, (), "int8", folder / "images"))
    assert report["rows"] and all("24 real" in row["inputs"] and row["agreement"] is not None for row in report["rows"])
    graph = onnx.load(path).graph
    quantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    inside = [node for node in products if node.input[0] in quantized and node.input[1] in quantized]
    # Per block fc1, fc2, depthwise; HiLo's product of the tokens, l_kv, projection; the last stage's product and projection; the head.
    assert len(inside) == 4 * 3 + 3 + 2 + 1
    # In float: the patch embedding, three offset convolutions and three deformable products, and attention's own products.
    assert len(products) - len(inside) == 1 + 3 + 3 + 2 * 3
    softmax = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmax) == 3 and not any(name in quantized for node in softmax for name in node.input)


@torch.no_grad()
@pytest.mark.parametrize(
    "command", documented("docs/deployment.md", r"python -m litv2 export litv2_small --format onnx(-standard)?"), ids=str
)
def test_documented_export(command, tmp_path, monkeypatch):
    """Of random weights where a download would put the published ones; of smaller images of one size."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = litv2_small().eval()
    put_download(tmp_path, "litv2_s.pth", {"model": model.state_dict()})
    format, path = command.words[-1], tmp_path / "litv2_small.onnx"
    run_here(monkeypatch, command, "--img-size", 64, "--dynamic", "--out", path)
    images = normal(0, 1, 3, 64, 64)
    (logits,) = load(format, path)(images)
    assert max_difference(logits, model(images)) < 1e-4
    opsets = {opset.domain: opset.version for opset in onnx.load(path).opset_import}
    assert opsets[""] == {"onnx": 19, "onnx-standard": 17}[format]


@torch.no_grad()
@pytest.mark.parametrize("command", documented("docs/deployment.md", r"python -m litv2 export FILE --format .*"), ids=str)
def test_documented_export_of_a_file(command, folder, tmp_path, monkeypatch):
    """Of a small model, and of smaller images where the document names no size."""
    format = command.words[command.words.index("--format") + 1]
    if format == "openvino":
        pytest.importorskip("openvino")
    model, path = calm_model().eval(), tmp_path / f"mine{suffix(format)}"
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pth")
    size = () if "--img-size" in command.words else ("--img-size", 64)
    run_here(monkeypatch, command, *size, "--out", path, files=dict(FILE=tmp_path / "mine.pth", DIR=folder / "images"))
    report = json.loads(path.with_name(path.name + ".parity.json").read_text())
    assert report["passed"] and report["dtype"] == ("int8" if "int8" in command.words else "float32")
    if "int8" in command.words:
        assert report["image_size"] == [256, 256] and "DequantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    else:
        images = normal(0, 3, 3, 64, 64)
        assert report["dynamic"] == ["batch"] and max_difference(load(format, path)(images)[0], model(images)) < 1e-4


def test_int8_needs_images(tmp_path):
    with pytest.raises(ValueError, match="int8 needs real images.*--images"):
        export(classifier(tiny_model(**SMALL)), "onnx", tmp_path / "a.onnx", Settings((64, 64), dtype="int8"))
    assert not list(tmp_path.iterdir())


def test_tensorrt(folder):
    path, _ = exported(folder, "tensorrt", dynamic=("batch",))
    script = path.with_suffix(".build_engine.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "--minShapes=images:1x3x64x96 --optShapes=images:8x3x64x96 --maxShapes=images:64x3x64x96" in script.read_text()
    assert subprocess.run([script, "fp17"], capture_output=True, text=True).stderr.startswith("usage:")
    header, *lines = path.with_suffix(".calibration.cache").read_text().splitlines()
    assert header.startswith("TRT-") and header.endswith("-EntropyCalibration2") and len(lines) > 50
    scales = {name: struct.unpack(">f", bytes.fromhex(digits))[0] for name, digits in (line.split(": ") for line in lines)}
    from litv2.export.images import read_images

    images = read_images(folder / "images", (64, 96), 32)
    assert scales["images"] == pytest.approx(images.abs().max().item() / 127, rel=1e-6)


def test_executorch(tmp_path):
    pytest.importorskip("executorch.runtime")
    with pytest.raises(ValueError, match=r"executorch supports fixed sizes only, got dynamic=\('batch',\)"):
        export(classifier(tiny_model(**SMALL)), "executorch", tmp_path / "tiny.pte", Settings((64, 96), dynamic=("batch",)))
    report = export(classifier(tiny_model(**SMALL)), "executorch", tmp_path / "tiny.pte", Settings((64, 96)))
    assert report["passed"] and report["dynamic"] == []


@torch.no_grad()
def test_pyramid(tmp_path):
    model = tiny_model(**SMALL).eval()
    export(pyramid(model), "onnx", tmp_path / "maps.onnx", Settings((70, 64), dynamic=("batch",)))
    images = normal(0, 2, 3, 70, 64)
    maps = load("onnx", tmp_path / "maps.onnx")(images)
    for ours, theirs in zip(maps, model.forward_pyramid(images), strict=True):
        assert max_difference(ours, theirs) < 1e-4 * max(1, theirs.abs().max())


def test_round_trip_of_commands(tmp_path):
    """pth -> safetensors -> ONNX -> onnxruntime."""
    pytest.importorskip("safetensors")
    torch.save({"model": tiny_model(**SMALL).state_dict()}, tmp_path / "tiny.pth")
    done = run_command("convert", tmp_path / "tiny.pth", tmp_path / "tiny.safetensors")
    assert done.returncode == 0, done.stderr
    arguments = ("--format", "onnx", "--img-size", 96, 64, "--dynamic", "batch", "--out", tmp_path / "tiny.onnx")
    done = run_command("export", tmp_path / "tiny.safetensors", *arguments)
    assert done.returncode == 0, done.stderr
    assert "100.0 %" in done.stdout and f"written to {tmp_path / 'tiny.onnx'}" in done.stdout
    images = normal(5, 5, 3, 96, 64)
    with torch.no_grad():
        (logits,), exact = load("onnx", tmp_path / "tiny.onnx")(images), tiny_model(**SMALL).eval()(images)
    assert max_difference(logits, exact) < 1e-4


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones(2, 10)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_graph_without_its_image_is_an_error(format, tmp_path):
    network = Network(Constant(), Constant(), ("logits",))
    with pytest.raises(ValueError, match="does not use its input"):
        export(network, format, tmp_path / f"constant{suffix(format)}", Settings((64, 64), dynamic=(), batch_size=2))
    assert not list(tmp_path.iterdir())


def test_wrong_numbers_are_an_error(tmp_path):
    model, other = tiny_model(**SMALL), tiny_model(**SMALL)
    with torch.no_grad():
        other.layers[2].downsample.dconv.conv_offset.weight[0] *= 1.01  # of one offset
    network = Network(classifier(other).module, model, ("logits",), classes=("logits",))
    with pytest.raises(ParityError, match=r"'logits' on . r.* differs .* above the tolerance of 1e-04 for float32") as error:
        export(network, "torch-export", tmp_path / "wrong.pt2", Settings((64, 64), dynamic=(), batch_size=1))
    assert [file.name for file in tmp_path.iterdir()] == ["wrong.pt2.parity.json"] and str(tmp_path) in str(error.value)
    report = json.loads((tmp_path / "wrong.pt2.parity.json").read_text())
    assert not report["passed"] and not all(row["passed"] for row in report["rows"])


def test_nan_is_an_error(tmp_path):
    model = tiny_model(**SMALL)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(ParityError, match="differs .* by nan"):
        export(classifier(model), "torch-export", tmp_path / "nan.pt2", Settings((64, 64), dynamic=(), batch_size=1))


@pytest.mark.parametrize(
    "format, name, settings, words",
    [
        ("onix", "a.onnx", {}, "'onix' must be one of torch-export, onnx"),
        ("onnx", "a.pt2", {}, "must end in .onnx for onnx"),
        ("onnx", "a.onnx", dict(dtype="bfloat16"), "dtype='bfloat16' is not supported by onnx; use float32, float16, int8"),
        ("onnx", "a.onnx", dict(image_size=(64, 31)), r"image_size=\(64, 31\) is too small: each side must be at least 32"),
        ("torch-export", "a.pt2", dict(image_size=(64, 63)), "each side must be at least 64"),
        ("onnx", "a.onnx", dict(images=Path("nowhere"), dtype="int8"), "--images nowhere"),
    ],
)
def test_bad_arguments(format, name, settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(classifier(tiny_model(**SMALL)), format, tmp_path / name, Settings(**{"image_size": (64, 64), **settings}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings, words", [(dict(dynamic=("time",)), "'batch', 'size'"), (dict(batch_size=0), "batch_size=0")])
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


def test_opset_17_refuses_what_it_does_not_have():
    from litv2.export.onnx_graph import lower_opset

    node = onnx.helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=1)
    values = [onnx.helper.make_tensor_value_info(name, 1, None) for name in "xsy"]
    graph = onnx.helper.make_graph([node], "g", values[:2], values[2:])
    with pytest.raises(ValueError, match="Resize of opset 18, as used here, cannot be converted to opset 17"):
        lower_opset(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))


@pytest.mark.parametrize(
    "format, package", [("onnx", "onnxruntime"), ("openvino", "openvino"), ("executorch", "executorch"), ("tensorrt", "onnx")]
)
def test_a_missing_package_is_named_with_its_extra(format, package, tmp_path):
    torch.save({"model": tiny_model(**SMALL).state_dict()}, tmp_path / "tiny.pth")
    code = f"import sys; sys.modules[{package!r}] = None; from litv2.__main__ import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "export", str(tmp_path / "tiny.pth"), "--format", format]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    extra = {"tensorrt": "onnx"}.get(format, format)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and f"pip install 'litv2[{extra}]'" in done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def test_runtimes_report_to_nobody():
    """They are told so before they are imported."""
    pytest.importorskip("openvino")
    code = """if True:
        import os, sys
        def watch(event, details):
            if event == "import" and details[0] == "onnxruntime":
                print("switch", os.environ["ORT_DISABLE_TELEMETRY"])
        sys.addaudithook(watch)
        from litv2.export import onnx_graph, openvino_ir, quantize
        from openvino.tools.ovc import telemetry_utils
        print(telemetry_utils.tm.__name__)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines() == ["switch 1", "openvino.tools.ovc.telemetry_stub"], done.stderr


def test_every_format_has_a_command_line():
    done = run_command("export", "--help")
    assert done.returncode == 0 and all(format in done.stdout for format in FORMATS)
    done = run_command("export", "nowhere.pth", "--format", "onnx")
    assert done.returncode == 2 and "nowhere.pth" in done.stderr
    done = run_command("export", "litv2_smal", "--format", "onnx")
    assert done.returncode == 2 and "litv2_smal" in done.stderr
