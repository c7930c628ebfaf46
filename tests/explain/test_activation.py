# SPDX-License-Identifier: Apache-2.0
"""Class activation maps: the package on this network, against the maps' definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import normal, tiny_model
from litv2.errors import UserError

pytestmark = pytest.mark.extra
pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)


def cam(*args, **kwargs) -> Tensor:
    from litv2.explain.activation import cam  # needs the package

    return cam(*args, **kwargs)


def scaled(maps: Tensor, H: int, W: int) -> Tensor:
    """(B, h, w) -> (B, H, W): positive values, enlarged, from 0 to 1."""
    maps = maps.relu() - maps.relu().amin((1, 2), keepdim=True)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)
    maps = F.interpolate(maps[:, None], size=(H, W), mode="bilinear")[:, 0]
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)


@pytest.mark.parametrize("options", [{}, dict(alpha=0.0), dict(alpha=1.0)], ids=str)
@pytest.mark.parametrize(("images", "H", "W"), [(1, 64, 96), (5, 107, 75)])
def test_grad_cam_is_the_original_class_activation_map(options, images, H, W):
    """The network ends in a mean over positions and one linear layer: the map is that of the class's weights (arXiv 1512.04150)."""
    model, x = tiny_model(**options), normal(0, images, 3, H, W)
    with torch.no_grad():
        model.eval()
        tokens, predicted = model.forward_features(x), model(x).argmax(-1)
        expected = torch.stack([token_map @ model.head.weight[number] for token_map, number in zip(tokens, predicted)])
    torch.testing.assert_close(cam(model.train(), x), scaled(expected, H, W), atol=1e-4, rtol=0)
    with torch.no_grad():
        third = scaled(tokens @ model.head.weight[3], H, W)
    torch.testing.assert_close(cam(model, x, 3), third, atol=1e-4, rtol=0)
    torch.testing.assert_close(cam(model, x, [3] * images, "gradcam"), cam(model, x, lambda logits: logits[3]))


def test_grad_cam_plus_plus():
    """Equation 19 of arXiv 1710.11063, with the higher derivatives of exp(score) as powers of the gradient, channel by channel."""
    model, x = tiny_model().eval(), normal(1, 2, 3, 64, 96)
    with torch.no_grad():
        tokens = model.forward_features(x).permute(0, 3, 1, 2).double()
    h, w = tokens.shape[2:]
    expected = torch.zeros(2, h, w, dtype=torch.double)
    for image in range(2):
        for channel in range(tokens.shape[1]):
            gradient = model.head.weight[4, channel].double().item() / (h * w)  # of the mean over positions, at each position
            total = tokens[image, channel].sum()
            alpha = gradient**2 / (2 * gradient**2 + total * gradient**3 + 1e-6) if gradient else 0.0
            expected[image] += tokens[image, channel] * (alpha * max(gradient, 0.0) * h * w)
    torch.testing.assert_close(cam(model, x, 4, "gradcam++").double(), scaled(expected, 64, 96), atol=1e-3, rtol=0)


def test_eigen_cam_is_the_first_principal_component():
    """Up to its sign, which is arbitrary."""
    model, x = tiny_model().eval(), normal(2, 1, 3, 96, 128)
    with torch.no_grad():
        tokens = model.forward_features(x)[0].flatten(0, 1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(tokens.T))
    component = torch.from_numpy((tokens - tokens.mean(0)) @ vectors[:, -1]).view(1, 3, 4)
    found = cam(model, x, method="eigencam").double()
    assert any(torch.allclose(found, scaled(sign * component, 96, 128), atol=1e-3) for sign in (1, -1))


def test_hires_cam_of_a_place():
    """Of a score that depends on one position, the map is there alone; gradients averaged over positions, as Grad-CAM's, are everywhere.
    Of the mean over positions, both are the same."""
    model, x = tiny_model(global_pool="").eval(), normal(5, 1, 3, 96, 128)
    place = cam(model, x, lambda logits: logits[1, 2].square().sum(), "hirescam")[0]
    assert divmod(int(place.argmax()), 128) in {(row, column) for row in range(32, 64) for column in range(64, 96)}
    assert place[:16].max() == place[80:].max() == place[:, :48].max() == 0
    pooled = tiny_model().eval()
    torch.testing.assert_close(cam(pooled, x, 3, "hirescam"), cam(pooled, x, 3), atol=1e-5, rtol=0)


def test_nothing_is_left_behind():
    model = tiny_model().train()
    model.stages[0].eval()
    model.stages[1].requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    flags, required = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():
        x = normal(3, 1, 3, 64, 64)
    for method in ("gradcam", "gradcam++", "eigencam", "hirescam"):
        cam(model, x, method=method)
    with pytest.raises(IndexError) as error:  # of a caller's own score; the package's context manager would hide it
        cam(model, x, lambda logits: logits[99])
    assert error.traceback  # which keeps the package's object, and hooks that it left, alive
    assert [m.training for m in model.modules()] == flags and [p.requires_grad for p in model.parameters()] == required
    assert (model.head.weight.grad == 1).all() and all(p.grad is None for p in model.parameters() if p is not model.head.weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "hirescam", "eigencam"])
def test_half_precision(method, dtype):
    """Maps of a model in half precision are, but for its rounding, those of the same weights in float32."""
    model, x = tiny_model().eval().to(dtype), normal(6, 1, 3, 96, 128).to(dtype)
    found, expected = cam(model, x, 3, method), cam(model.float(), x.float(), 3, method)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)


def test_other_layers_and_wrong_input():
    model, x = tiny_model().eval(), normal(4, 2, 3, 64, 64)
    both = cam(model, x, 1, layers=[model.layers[2], model.norm])
    each = [cam(model, x, 1, layers=[layer]) for layer in (model.layers[2], model.norm)]
    mean = sum(each) / 2
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    torch.testing.assert_close(both, (mean - low) / (high - low), atol=1e-5, rtol=0)
    for arguments, message in (
        (dict(target=10), "class 10 must be one of 0 to 9"),
        (dict(target=[1]), "1 targets for 2 images"),
        (dict(method="scorecam"), "must be one of gradcam, gradcam"),
    ):
        with pytest.raises(UserError, match=message):
            cam(model, x, **arguments)
    with pytest.raises(UserError, match="a Linear has none"):
        cam(nn.Linear(2, 2), x)
