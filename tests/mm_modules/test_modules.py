# SPDX-License-Identifier: Apache-2.0
"""The modules over ``deform_conv2d``: parameters, torchvision's operator on the same values, and the start of training."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from helpers import fill, max_difference, normal
from mm_modules import DCN
from mm_modules.DCN import DeformConv2d, DeformConv2dPack, DeformConv2dPackMore, ModulatedDeformConv2d, ModulatedDeformConv2dPack

# Every argument has another value in each direction, so that an exchange of two would show.
GEOMETRY = dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, deformable_groups=4)
IN, OUT, TAPS, CELLS = 8, 6, 4 * 3 * 2, (5, 9)
ALL = {
    DeformConv2d: {},
    DeformConv2dPack: {"conv_offset.weight": (2 * TAPS, IN, 3, 2), "conv_offset.bias": (2 * TAPS,)},
    DeformConv2dPackMore: {
        "conv_offset.0.weight": (2, IN, 1, 1),
        "conv_offset.1.weight": (2,),
        "conv_offset.1.bias": (2,),
        "conv_offset.3.weight": (2 * TAPS, 2, 3, 2),
        "conv_offset.3.bias": (2 * TAPS,),
    },
    ModulatedDeformConv2d: {},
    ModulatedDeformConv2dPack: {"conv_offset_mask.weight": (3 * TAPS, IN, 3, 2), "conv_offset_mask.bias": (3 * TAPS,)},
}


def images() -> Tensor:
    return normal(0, 3, IN, 9, 7)


def torchvisions(module: nn.Module, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
    """torchvision's module with the same weights."""
    geometry = {name: value for name, value in GEOMETRY.items() if name != "deformable_groups"}
    theirs = torchvision.ops.DeformConv2d(IN, OUT, **geometry)
    theirs.load_state_dict({name: value for name, value in module.state_dict().items() if name in ("weight", "bias")})
    return theirs(x, offset, mask)


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The plain convolution that predicts, of ``GEOMETRY``."""
    return nn.functional.conv2d(x, weight, bias, GEOMETRY["stride"], GEOMETRY["padding"], GEOMETRY["dilation"])


@pytest.mark.parametrize("kind", ALL)
def test_parameters(kind):
    expected = {"weight": (OUT, IN // 2, 3, 2), "bias": (OUT,)} | ALL[kind]
    module = kind(IN, OUT, **GEOMETRY)
    assert {name: tuple(parameter.shape) for name, parameter in module.named_parameters()} == expected
    assert kind(IN, OUT, **GEOMETRY, bias=False).bias is None
    with pytest.raises(ValueError, match=f"{kind.__name__}: groups=4"):
        kind(8, 6, 3, groups=4)


def test_the_releases_order_of_arguments():
    """Positional arguments mean what they meant: groups, deformable groups, im2col_step, bias, and the rate of the offsets."""
    with pytest.warns(UserWarning, match="im2col_step=64 has no effect"), pytest.warns(UserWarning, match="lr_mult=0.1 has no effect"):
        module = DeformConv2dPack(8, 6, 3, 1, 1, 1, 2, 4, 64, False, 0.1)
    assert module.weight.shape == (6, 4, 3, 3) and module.bias is None and module.conv_offset.out_channels == 4 * 18
    assert set(DCN.__all__) >= {kind.__name__ for kind in ALL}


@torch.no_grad()
def test_given_offsets():
    x, offset, mask = images(), 2 * normal(1, 3, 2 * TAPS, *CELLS), normal(2, 3, TAPS, *CELLS).sigmoid()
    plain, modulated = (fill(kind(IN, OUT, **GEOMETRY)) for kind in (DeformConv2d, ModulatedDeformConv2d))
    assert max_difference(plain(x, offset), torchvisions(plain, x, offset)) < 1e-5
    assert max_difference(modulated(x, offset, mask), torchvisions(modulated, x, offset, mask)) < 1e-5


@torch.no_grad()
def test_predicted_offsets():
    x, module = images(), fill(DeformConv2dPack(IN, OUT, **GEOMETRY))
    offset = conv(x, module.conv_offset.weight, module.conv_offset.bias)
    assert max_difference(module(x), torchvisions(module, x, offset)) < 1e-5


@torch.no_grad()
def test_offsets_predicted_by_a_network():
    x, module = images(), fill(DeformConv2dPackMore(IN, OUT, **GEOMETRY)).eval()
    state = {name.removeprefix("conv_offset."): value for name, value in module.state_dict().items()}
    norm = (state["1.running_mean"], state["1.running_var"], state["1.weight"], state["1.bias"])
    hidden = nn.functional.batch_norm(nn.functional.conv2d(x, state["0.weight"]), *norm).relu()
    offset = conv(hidden, state["3.weight"], state["3.bias"])
    assert max_difference(module(x), torchvisions(module, x, offset)) < 1e-5


@torch.no_grad()
def test_predicted_offsets_and_mask():
    x, module = images(), fill(ModulatedDeformConv2dPack(IN, OUT, **GEOMETRY))
    first, second, mask = conv(x, module.conv_offset_mask.weight, module.conv_offset_mask.bias).chunk(3, dim=1)
    expected = torchvisions(module, x, torch.cat((first, second), dim=1), mask.sigmoid())
    assert max_difference(module(x), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind, share", [(DeformConv2dPack, 1.0), (DeformConv2dPackMore, 1.0), (ModulatedDeformConv2dPack, 0.5)])
def test_training_starts_from_the_plain_convolution(kind, share):
    """Offsets of zero, and masks of one half."""
    module = kind(IN, OUT, **GEOMETRY)
    plain = nn.functional.conv2d(images(), share * module.weight, module.bias, (2, 1), (1, 2), (1, 2), groups=2)
    assert max_difference(module(images()), plain) < 1e-5


@pytest.mark.parametrize("kind", [DeformConv2dPack, DeformConv2dPackMore, ModulatedDeformConv2dPack])
def test_predictions_stay_in_float32_under_autocast(kind):
    module, x = fill(kind(IN, OUT, **GEOMETRY)).eval(), images()
    predict = module.predict_offset_and_mask if kind is ModulatedDeformConv2dPack else module.predict_offset
    exact = predict(x)
    with torch.autocast("cpu", torch.bfloat16):
        again, low = predict(x), module(x)
    assert low.dtype == torch.bfloat16
    for first, second in zip((exact,) if isinstance(exact, Tensor) else exact, (again,) if isinstance(again, Tensor) else again):
        assert second.dtype == torch.float32 and torch.equal(first, second)
    low.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
