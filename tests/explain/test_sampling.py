# SPDX-License-Identifier: Apache-2.0
"""Where token merging samples: planted offsets, and the deformable convolution itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import normal, tiny_model
from litv2 import LITv2
from litv2.explain import offsets
from litv2.explain.recording import Merged
from litv2.explain.sampling import spread_over_samples
from mm_modules.DCN import deform_conv2d


def planted(biases: list[list[float]]) -> LITv2:
    """A model whose merging k moves all its samples by biases[k], rows and columns in tokens."""
    model = tiny_model()
    for stage, bias in zip(model.stages, biases):
        nn.init.zeros_(stage.downsample.dconv.conv_offset.weight)
        stage.downsample.dconv.conv_offset.bias.data.copy_(torch.tensor(bias * 4))
    return model


def test_without_offsets_the_samples_are_the_patches_of_the_cell():
    model = planted([[0.0, 0.0]] * 3)
    for part, side in zip(offsets(model, normal(0, 2, 3, 128, 160), (70.0, 40.0)), (8, 16, 32), strict=True):
        row, column = 40 // side, 70 // side
        assert part.stride == side and part.cells.tolist() == [[row, column]] * 2
        patches = {(column * side + 4 * x + 2.0, row * side + 4 * y + 2.0) for x in range(side // 4) for y in range(side // 4)}
        assert {tuple(point) for point in part.points[1].tolist()} == patches
        assert torch.equal(part.points, part.regular) and (part.weights == 1).all()


def test_planted_offsets_appear_in_pixels():
    """One of d tokens, at a stride of s pixels, moves by d * s pixels whatever is sampled through it."""
    shifts = [(0.25, -0.5), (-0.75, 0.5), (0.5, 0.25)]  # rows and columns
    for part, expected in zip(offsets(planted([list(s) for s in shifts]), normal(0, 1, 3, 160, 160), (80.0, 80.0)), (1, 2, 3)):
        rows, columns = (sum(4 * 2**k * shifts[k][axis] for k in range(expected)) for axis in (0, 1))
        torch.testing.assert_close(part.points - part.regular, torch.tensor([columns, rows]).expand_as(part.points))


def test_samples_beyond_the_edge_count_less():
    """Of the upper left cell: half a token above the first row, and two to the left, where there is nothing."""
    model = planted([[-0.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
    first = offsets(model, normal(0, 1, 3, 64, 64), (0.0, 0.0))[0]
    assert first.weights[0].tolist() == [0.5, 0.5, 1, 1] and first.points[0, 0].tolist() == [2, 0]
    model = planted([[0.0, -2.0], [0.0, 0.0], [0.0, 0.0]])
    assert offsets(model, normal(0, 1, 3, 64, 64), (0.0, 0.0))[0].weights[0].tolist() == [0, 0, 0, 0]
    model = planted([[0.0, 0.0], [-0.25, 0.0], [0.0, 0.0]])  # what the second merging reads beyond the edge counts less in its first
    assert offsets(model, normal(0, 1, 3, 64, 64), (0.0, 0.0))[1].weights[0].tolist() == [0.75] * 8 + [1] * 8


def test_two_mergings_read_the_points_that_they_are_said_to_read():
    """On a map whose values are the coordinates, which bilinear interpolation keeps: the mean over a cell's points is what two
    deformable convolutions with weights of one quarter give. Offsets differ from cell to cell, and stay on the map."""
    model, x = tiny_model(), normal(1, 1, 3, 160, 192)
    for stage in model.stages[:-1]:
        nn.init.normal_(stage.downsample.dconv.conv_offset.weight, std=0.02)
    first, second = (stage.downsample.dconv for stage in model.stages[:2])
    inputs = {}
    for conv in (first, second):
        conv.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
    with torch.no_grad():
        model.eval()(x)
        rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(48.0), indexing="ij")
        values = torch.stack((columns, rows))[:, None] * 4 + 2  # x and y of the tokens' middles in pixels
        quarters = torch.full((1, 1, 2, 2), 0.25)
        for conv in (first, second):
            moved = conv.predict_offset(inputs[conv])
            values = deform_conv2d(values, moved.expand(2, -1, -1, -1).contiguous(), quarters, None, 2)
    for conv in (first, second):
        conv._forward_pre_hooks.clear()
    _, part, _ = offsets(model, x, (100.0, 90.0))
    row, column = part.cells[0].tolist()
    assert (part.points - part.regular).abs().max() > 1 and part.weights.min() == 1
    torch.testing.assert_close(part.points[0].mean(0), values[:, 0, row, column], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("H", "W"), [(6, 8), (7, 5)])
def test_shares_spread_over_samples_as_the_convolution_reads(H, W):
    offset = normal(2, 2, H // 2, W // 2, 4, 2) * 2
    share = normal(3, 2, H // 2, W // 2).abs()
    tokens = torch.zeros(2, 1, H, W, requires_grad=True)
    moved = offset.flatten(3).permute(0, 3, 1, 2).contiguous()
    (deform_conv2d(tokens, moved, torch.full((1, 1, 2, 2), 0.25), None, 2)[:, 0] * share).sum().backward()
    torch.testing.assert_close(spread_over_samples(Merged("", 4, H, W, offset), share), tokens.grad[:, 0])
