# SPDX-License-Identifier: Apache-2.0
"""Spectra of Hi-Fi and Lo-Fi, against planted waves and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import normal, tiny_model
from litv2 import LITv2, fuse
from litv2.errors import UserError
from litv2.explain import spectrum
from litv2.explain.frequencies import energy_above, magnitude, mean_with_interval, radial_profile


def wave(H: int, W: int, rows: int, columns: int) -> Tensor:
    """(1, H, W, 1): a cosine with this many periods over each side."""
    y, x = torch.meshgrid(torch.arange(H) / H, torch.arange(W) / W, indexing="ij")
    return (2 * math.pi * (rows * y + columns * x)).cos()[None, :, :, None]


@pytest.mark.parametrize(("H", "W"), [(14, 14), (7, 12), (9, 5)])
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (2, 1), (3, 0), (0, 2), (-3, 2)])
def test_a_wave_peaks_at_its_frequency(H, W, rows, columns):
    peaks = {tuple(peak) for peak in (magnitude(wave(H, W, rows, columns))[0] > 1).nonzero().tolist()}
    assert peaks == {(H // 2 + sign * rows, W // 2 + sign * columns) for sign in (1, -1)}


def test_energy_above_half_of_nyquist():
    """Of waves of 16 tokens: up to 4 periods are low. A sum of waves has the sum of their energies, and its mean does not count."""
    for rows, columns, share in ((1, 0, 0), (0, 4, 0), (4, 1, 1), (0, 5, 1), (8, 0, 1)):
        assert energy_above(wave(16, 16, rows, columns)).item() == pytest.approx(share, abs=1e-5)
    mixed = 5 + 2 * wave(16, 16, 2, 0) + wave(16, 16, 0, 6)
    assert energy_above(mixed).item() == pytest.approx(1 / 5, abs=1e-5)


def test_radial_profile_is_the_mean_of_each_ring():
    H, W = 9, 14
    values = normal(0, H, W).abs()
    rings: dict[int, list[float]] = {}
    for y in range(H):
        for x in range(W):
            distance = math.hypot((y - H // 2) / H, (x - W // 2) / W)
            rings.setdefault(round(distance * W), []).append(values[y, x].item())
    frequencies, profile = radial_profile(values)
    assert frequencies.tolist() == pytest.approx([ring / W for ring in sorted(rings)])
    assert profile.tolist() == pytest.approx([np.mean(rings[ring]) for ring in sorted(rings)])


@pytest.mark.parametrize("images", [1, 5])
def test_spectrum_is_of_the_outputs_of_the_branches(images):
    """With odd sizes, and the model in training mode; several batches give what one gives."""
    model, x = tiny_model().train(), normal(1, images, 3, 75, 98)
    outputs = []
    with torch.no_grad():
        model.eval()
        for block in [*model.stages[2].blocks, *model.stages[3].blocks]:
            block.attn.register_forward_hook(lambda module, args, out: outputs.append((module, args[1:], out)))
        model(x)
        for stage in (2, 3):
            for block in model.stages[stage].blocks:
                block.attn._forward_hooks.clear()
    found = {(part.block, part.branch): part for part in spectrum(model.train(), x)}
    assert list(found) == [
        ("layers.2.blocks.0", "hifi"), ("layers.2.blocks.0", "lofi"), ("layers.2.blocks.1", "hifi"), ("layers.2.blocks.1", "lofi"),
        ("layers.3.blocks.0", "lofi"),
    ]  # fmt: skip
    for (block, branch), part in found.items():
        hilo, (H, W), out = outputs[2 * int(block[7]) - 4 + int(block[-1])]
        maps = (out[..., : hilo.h_dim] if branch == "hifi" else out[..., hilo.h_dim :]).numpy().reshape(images, H, W, -1)
        expected = np.abs(np.fft.fftshift(np.fft.fft2(maps, axes=(1, 2), norm="ortho"), axes=(1, 2))).mean((0, 3))
        np.testing.assert_allclose(part.magnitude, expected, rtol=1e-4, atol=1e-5)
        assert part.high.shape == (images,)
    for part in spectrum(model, (batch for batch in x.split(2))):
        torch.testing.assert_close(part.magnitude, found[part.block, part.branch].magnitude)


@pytest.mark.parametrize(("alpha", "branches"), [(0.0, {"hifi", "lofi"}), (1.0, {"lofi"})])
def test_a_branch_without_heads_is_not_listed(alpha, branches):
    """Stage 4, whose window is 1, always has Lo-Fi alone."""
    found = spectrum(tiny_model(alpha=alpha), normal(2, 1, 3, 64, 64))
    assert {part.branch for part in found} == branches
    assert {part.branch for part in found if "layers.2" in part.block} == ({"hifi"} if alpha == 0 else {"lofi"})


def test_images_without_a_common_spectrum():
    model = tiny_model()
    with pytest.raises(UserError, match="no images"):
        spectrum(model, [])
    with pytest.raises(UserError, match=r"\(64, 64\) and \(64, 96\)"):
        spectrum(model, [torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 96)])
    with pytest.raises(UserError, match="expected images of shape"):
        spectrum(model, torch.zeros(1, 1, 64, 64))
    with pytest.raises(UserError, match="no block with attention"):
        spectrum(fuse(tiny_model()), torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="no block with attention"):
        spectrum(LITv2(embed_dim=8, num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), local_ws=(0, 0, 0, 0)), torch.zeros(1, 3, 64, 64))


def test_interval_is_scipys():
    from scipy import stats

    values = normal(3, 20)
    expected = stats.ttest_1samp(values.double().numpy(), 0).confidence_interval(0.95)
    assert mean_with_interval(values) == pytest.approx((values.mean().item(), expected.low, expected.high), abs=1e-6)
    assert all(math.isnan(end) for end in mean_with_interval(values[:1])[1:])
