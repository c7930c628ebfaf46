# SPDX-License-Identifier: Apache-2.0
"""The registered models have the properties that timm's own test-suite checks of its models, and serve its training tools."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import assert_as_precise, fill, golden, golden_arrays, manifest, max_difference, normal, rounded_model, timm_model
from litv2.factory import VARIANTS
from litv2.weights.releases import ZOO

timm = pytest.importorskip("timm")
from timm.layers import set_scriptable  # noqa: E402
from timm.models import get_notrace_functions, get_notrace_modules, group_parameters, model_parameters  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402

NAMES = [name for name, entry in ZOO.items() if entry.task == "classification"]


# The registry


def test_names():
    assert timm.list_models("litv2*") == sorted(NAMES) == timm.list_pretrained("litv2*")
    assert NAMES[:4] == ["litv2_small", "litv2_medium", "litv2_base", "litv2_base_384"]
    assert NAMES[4:] == [f"litv2_small_alpha{alpha}" for alpha in ("00", "02", "04", "05", "07", "09", "10")]
    assert timm.models.list_models(module="litv2") == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_the_model_of_the_zoo(name):
    entry = ZOO[name]
    with torch.device("meta"):
        model, own = timm.create_model(name), VARIANTS[entry.variant](alpha=entry.alpha)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in own.state_dict().items()}
    if name in ("litv2_small", "litv2_medium", "litv2_base"):
        assert {key: list(shape) for key, shape in shapes.items()} == manifest()[f"litv2_{entry.variant[0]}"]
    cfg = model.default_cfg
    assert model.pretrained_cfg is cfg and cfg["architecture"] == name and cfg["url"] == entry.url
    assert cfg["input_size"] == (3, *entry.image_size)
    assert f"{cfg['classifier']}.weight" in shapes and f"{cfg['first_conv']}.weight" in shapes


def test_published_preprocessing():
    """256 / 224 then a centre crop; the images of 384 pixels are resized whole."""
    imagenet = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic")
    for name, size, crop in (("litv2_small", 224, (0.875, "center")), ("litv2_base_384", 384, (1.0, "squash"))):
        config = timm.data.resolve_model_data_config(timm_model(name))
        assert config == dict(input_size=(3, size, size), crop_pct=crop[0], crop_mode=crop[1], **imagenet)


# What timm's tests/test_models.py checks, in its order


def test_inference():
    """Reference numbers of the whole model, through its parts."""
    case = golden()["classification"][0]
    assert case["variant"] == "s" and case["alpha"] == 0.9
    model = fill(timm.create_model("litv2_small")).eval()
    with torch.inference_mode():
        features = model.forward_features(normal(case["input_seed"], case["batch"], 3, case["img_size"], case["img_size"]))
        pre_logits = model.forward_head(features, pre_logits=True)
        assert max_difference(model.get_classifier()(pre_logits), golden_arrays()["cls0_logits"]) <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name):
    model = timm_model(name, num_classes=42)
    images = torch.randn(2, 3, 64, 64)
    outputs = model(images)
    assert outputs.shape == (2, 42) and outputs.isfinite().all()
    outputs.mean().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval()
    outputs = model(images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["litv2_small", "litv2_base_384", "litv2_small_alpha00"])
def test_default_cfg(name):
    model = timm_model(name).eval()
    cfg = model.default_cfg
    images = torch.randn(1, *cfg["input_size"])
    assert model.num_classes == 1000 and model.num_features == model.head_hidden_size == 256 and model.output_fmt == "NHWC"
    with torch.inference_mode():
        features = model.forward_features(images)  # never pooled
        assert features.shape == (1, *cfg["pool_size"], 256)
        pre_logits = model.forward_head(features, pre_logits=True)
        assert pre_logits.shape == (1, 256)
        model.reset_classifier(0)
        assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
        assert torch.equal(model(images), pre_logits)
        model.reset_classifier(0, "")
        assert torch.equal(model(images), features)
        assert timm_model(name, num_classes=0, global_pool="").eval()(images).shape == features.shape
        model.reset_classifier(7, "avg")
        assert model(images).shape == (1, 7)
        model.reset_classifier(7, "")
        assert model(images).shape == (1, *cfg["pool_size"], 7)  # a class at each position


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript, and lists the checks that a trace leaves out
def test_torchscript_by_tracing():
    """Scripting does not apply, since TorchScript's compiler does not take this code (torch itself points to export instead);
    a trace does, and keeps the sizes in its graph."""
    with set_scriptable(True):
        model = fill(timm_model()).eval()
    with pytest.raises((RuntimeError, ValueError)):
        torch.jit.script(model)
    traced = torch.jit.trace(model, normal(0, 1, 3, 96, 64))
    for shape in ((1, 3, 96, 64), (2, 3, 64, 96)):
        assert max_difference(traced(normal(1, *shape)), model(normal(1, *shape))) < 1e-4


def fx_model(model: nn.Module) -> nn.Module:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    tracing = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
    nodes = (nodes[-1:] for nodes in extraction.get_graph_node_names(model, tracer_kwargs=tracing))
    return extraction.create_feature_extractor(
        model, **dict(zip(("train_return_nodes", "eval_return_nodes"), nodes)), tracer_kwargs=tracing
    )


def test_forward_fx():
    model = fill(timm_model()).eval()
    traced = fx_model(model).eval()
    with torch.inference_mode():
        for shape in ((1, 3, 128, 128), (2, 3, 70, 96)):
            (logits,) = traced(normal(0, *shape)).values()
            assert max_difference(logits, model(normal(0, *shape))) < 1e-5  # one of them runs the native blocks


def test_backward_fx():
    model = timm_model(num_classes=42, drop_path_rate=0.2).train()
    (outputs,) = fx_model(model)(torch.randn(2, 3, 64, 64)).values()
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


# Training's tools


def test_parameter_groups():
    model = timm_model(depths=(2, 2, 6, 2))
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert layers.keys() == {name for name, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(14)), "the patch embedding, 12 blocks, the head"
    assert layers["patch_embed.norm.bias"] == 0 and layers["head.weight"] == 13 and layers["norm.weight"] == 12
    assert layers["layers.0.blocks.0.norm2.weight"] == 1
    assert layers["layers.0.blocks.1.mlp.fc1.weight"] == layers["layers.0.downsample.dconv.conv_offset.weight"] == 2
    assert layers["layers.2.blocks.5.attn.l_q.weight"] == layers["layers.2.downsample.norm_layer.bias"] == 10
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["patch_embed.proj.weight"] == 0 and coarse["layers.3.blocks.1.norm1.bias"] == 4 and coarse["head.bias"] == 5


def test_layer_decay():
    model = timm_model()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == set(names.values())
    assert groups["head.weight"]["lr_scale"] == 1 and groups["patch_embed.proj.weight"]["lr_scale"] == 0.5**6
    for name, parameter in model.named_parameters():
        assert groups[name]["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name
    assert model_parameters(model, exclude_head=True)[-1] is model.norm.bias


def test_arguments_of_create_model():
    model = timm_model("litv2_small", drop_path_rate=0.4, drop_rate=0.1, exportable=True, scriptable=True, num_classes=3)
    assert model.layers[3].blocks[0].drop_path.rate == pytest.approx(0.4) and model.head_drop.p == 0.1
    for size in (96, (96, 160)):
        model = timm_model(img_size=size)
        H, W = (size, size) if isinstance(size, int) else size
        config = timm.data.resolve_model_data_config(model)
        assert config["input_size"] == (3, H, W) and config["crop_pct"] == 0.875
        assert model.forward_features(torch.randn(1, 3, H, W)).shape[1:3] == model.default_cfg["pool_size"]
    model = timm_model(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        (dict(img_size=31), ValueError, "img_size=31 must be"),
        (dict(img_size=(224, 224, 3)), ValueError, "must be one side or"),
        (dict(global_pool="max"), ValueError, "global_pool='max' must be 'avg'"),
        (dict(window_size=7), TypeError, "window_size"),
        (dict(pretrained=True, cache_dir="elsewhere"), ValueError, "TORCH_HOME"),
        (dict(pretrained_cfg="imagenet21k"), RuntimeError, "Invalid pretrained tag"),
    ],
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        timm_model(**kwargs)
    with pytest.raises(ValueError, match="output_fmt='NLC' must be"):
        timm_model().forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")


def test_precision_layout_and_compilation():
    model = fill(timm_model()).eval()
    images = normal(0, 2, 3, 64, 96)
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert max_difference(compiled(images), expected) < 1e-4
    pyramid = timm_model(features_only=True).eval()
    levels = torch.compile(pyramid, fullgraph=True, backend="eager")(images)
    assert all(max_difference(level, other) < 1e-4 for level, other in zip(levels, pyramid(images), strict=True))
    last = fill(timm_model()).eval().to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert max_difference(last, expected) < 1e-4
    plain = rounded_model(model, torch.bfloat16)(images.bfloat16().float())
    assert_as_precise(model.bfloat16()(images.bfloat16()), plain, expected)
