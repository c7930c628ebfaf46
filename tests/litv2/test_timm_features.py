# SPDX-License-Identifier: Apache-2.0
"""The pyramid as timm gives it: features_only, forward_intermediates and pruning, with the contract of timm's hierarchical models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers import fill, normal, timm_model, tiny_model

timm = pytest.importorskip("timm")
from timm.models import FeatureInfo  # noqa: E402

CHANNELS, STRIDES = [32, 64, 128, 256], [4, 8, 16, 32]


@pytest.mark.parametrize(
    "out_indices, levels",
    [((0, 1, 2, 3), [0, 1, 2, 3]), ((1, 2, 3), [1, 2, 3]), ((0, 2), [0, 2]), ((1,), [1]), (2, [2, 3]), ((-1,), [3]), ((-3, -2), [1, 2])],
)
@pytest.mark.parametrize("feature_cls", ["getter", "hook"])
def test_features(out_indices, levels, feature_cls):
    """features_only: channels, strides and sizes as announced, the numbers of the plain model."""
    model = timm_model(features_only=True, out_indices=out_indices, feature_cls=feature_cls).eval()
    fill(model.model if feature_cls == "getter" else model.body)
    assert model.feature_info.channels() == [CHANNELS[i] for i in levels]
    assert model.feature_info.reduction() == [STRIDES[i] for i in levels]
    images = normal(0, 1, 3, 75, 96)
    expected = tiny_model().eval().forward_pyramid(images)
    for i, level in zip(levels, model(images), strict=True):
        if feature_cls == "hook":  # it gives what the stages return, which the wrapper says
            assert model.output_fmt == "NHWC"
            level = level.permute(0, 3, 1, 2)
        assert level.shape == (1, CHANNELS[i], math.ceil(75 / 4) // 2**i, 24 // 2**i)
        assert torch.equal(level, expected[i])


def test_default_features():
    model = timm_model("litv2_base_384", features_only=True)
    assert model.feature_info.channels() == CHANNELS and "num_classes" not in model.pretrained_cfg
    assert model.feature_info.module_name() == [f"layers.{i}" for i in range(4)]


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (0, 1), (2,)])
def test_features_keep_only_what_they_use(out_indices):
    model = timm_model(features_only=True, out_indices=out_indices)
    sum(level.square().mean() for level in model(torch.randn(2, 3, 64, 64))).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kwargs", [dict(out_indices=(4,)), dict(out_indices=(-5,)), dict(out_indices=0), dict(out_indices=())])
def test_features_that_are_not_there(kwargs):
    with pytest.raises(ValueError, match="must be some of the stages 0 to 3"):
        timm_model(features_only=True, **kwargs)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "fx"])
def test_feature_wrappers_that_would_see_merged_maps(feature_cls):
    with pytest.raises(ValueError, match=f"feature_cls='{feature_cls}' must be 'getter' or 'hook'"):
        timm_model(features_only=True, feature_cls=feature_cls)


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_forward_intermediates(output_fmt):
    model = fill(timm_model()).eval()
    images = normal(0, 2, 3, 64, 96)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    output, maps = model.forward_intermediates(images, output_fmt=output_fmt)
    axis = 1 if output_fmt == "NCHW" else 3
    assert [level.shape[axis] for level in maps] == info.channels() == CHANNELS
    pyramid = [level if output_fmt == "NCHW" else level.permute(0, 2, 3, 1) for level in model.forward_pyramid(images)]
    assert all(torch.equal(level, expected) for level, expected in zip(maps, pyramid, strict=True))
    features = model.forward_features(images)
    assert torch.equal(output, features)

    # A norm belongs to the last stage alone.
    output, normed = model.forward_intermediates(images, norm=True, output_fmt=output_fmt)
    assert torch.equal(normed[0], pyramid[0]) and not torch.equal(normed[3], pyramid[3]) and torch.equal(output, features)
    assert torch.equal(normed[3], features if output_fmt == "NHWC" else features.permute(0, 3, 1, 2))
    only = model.forward_intermediates(images, indices=[-1], norm=True, output_fmt=output_fmt, intermediates_only=True)
    assert len(only) == 1 and torch.equal(only[0], normed[3])

    # The first result is that of the last stage that was run, normalised if it is the final one.
    output, some = model.forward_intermediates(images, indices=[0, 2], stop_early=True, output_fmt=output_fmt)
    assert len(some) == 2 and torch.equal(some[1], pyramid[2])
    assert torch.equal(output, pyramid[2] if output_fmt == "NHWC" else pyramid[2].permute(0, 2, 3, 1))
    output, some = model.forward_intermediates(images, indices=2, output_fmt=output_fmt)
    assert torch.equal(some[0], pyramid[2]) and torch.equal(output, features)

    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(images)[0], features)


def test_intermediates_stop_early():
    """Later stages are not run, and images that are too small for them are then fine."""
    model = timm_model().eval()
    ran = []
    model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    for indices, expected in (([1], []), ([2], [2])):
        model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=indices, stop_early=True)
        assert ran == expected
    assert model.forward_intermediates(torch.randn(1, 3, 8, 8), indices=[1], stop_early=True, intermediates_only=True)[0].shape[2:] == (
        1,
        1,
    )


def test_same_contract_as_swin():
    """Indices, shapes and pruning agree with those of timm's hierarchical model with tokens in the same layout."""

    def models() -> list[nn.Module]:
        sizes = dict(img_size=64, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=2)
        return [timm_model().eval(), timm.create_model("swinv2_tiny_window8_256", **sizes).eval()]

    images = torch.randn(1, 3, 64, 64)
    whole = models()
    for indices in (None, 1, 3, [0], [1, 2], [-1], [3, 0], [2, 2]):
        for arguments in (dict(), dict(stop_early=True), dict(norm=True), dict(stop_early=True, norm=True)):
            (ours, our_maps), (theirs, their_maps) = (model.forward_intermediates(images, indices, **arguments) for model in whole)
            assert ours.shape == theirs.shape, (indices, arguments)
            assert [level.shape for level in our_maps] == [level.shape for level in their_maps], (indices, arguments)
    for indices in (4, 1, [0], [2, 1]):
        for arguments in (dict(), dict(prune_norm=True, prune_head=False)):
            states = []
            for model in models():
                wanted = model.prune_intermediate_layers(indices, **arguments)
                gone = [isinstance(part, nn.Identity) for part in (model.norm, model.get_classifier())]
                states.append((wanted, len(model.layers), gone, model.num_features, model.head_hidden_size, model.global_pool))
                states[-1] += (model(images).shape,)
            assert states[0] == states[1], (indices, arguments)
