# SPDX-License-Identifier: Apache-2.0
"""The frequencies in the outputs of Hi-Fi and Lo-Fi: figure 5 of the paper, and the share of energy in the upper half."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from .recording import Attended, Merged, check_images, network_of, watched

__all__ = ["BranchSpectrum", "branches", "energy_above", "magnitude", "mean_with_interval", "radial_profile", "spectrum"]

BRANCHES = ("hifi", "lofi")
HALF_NYQUIST = 0.25  # cycles per token: one period in four tokens; the highest frequency along an axis is 0.5


@dataclass(frozen=True)
class BranchSpectrum:
    """Spectrum of one branch of one block over all images.

    Attributes:
        block: name of the block, such as ``layers.2.blocks.0``.
        branch: "hifi" or "lofi".
        magnitude: (H, W), centred, averaged over channels and images.
        high: (images,), each image's share of the energy above half of the Nyquist frequency.
    """

    block: str
    branch: str
    magnitude: Tensor
    high: Tensor


def spectrum(model: nn.Module, images: Tensor | Iterable[Tensor]) -> list[BranchSpectrum]:
    """Returns the spectrum of each branch of each block with attention, in the order of the network, Hi-Fi first.

    A branch without heads (``alpha`` 0 or 1; Hi-Fi where the window is 1) is not in the list.

    Args:
        model: a LITv2, or a model with one as its backbone. Any mode; it is as before afterwards.
        images: a batch (B, C, H, W), normalised, or several of one size.

    Raises:
        UserError: there is no image or no attention, or the sizes differ.
    """
    network = network_of(model)
    magnitudes: dict[tuple[str, str], list[Tensor]] = {}
    shares: dict[tuple[str, str], list[Tensor]] = {}

    def see(layer: Attended | Merged) -> None:
        if isinstance(layer, Attended):
            for branch, maps in branches(layer).items():
                magnitudes.setdefault((layer.name, branch), []).append(magnitude(maps))
                shares.setdefault((layer.name, branch), []).append(energy_above(maps))

    size = None
    with watched(network, see):
        for batch in [images] if isinstance(images, Tensor) else images:
            check_images(network, batch)
            if size not in (None, batch.shape[2:]):
                raise UserError(f"spectrum: images of {tuple(size)} and {tuple(batch.shape[2:])} pixels; their spectra have no average")
            size = batch.shape[2:]
            network(batch)
    if size is None:
        raise UserError("spectrum: there are no images")
    if not magnitudes:
        raise UserError("spectrum: the model has no block with attention that is HiLo; leave it out of --what")
    return [BranchSpectrum(*key, torch.cat(parts).mean(0).cpu(), torch.cat(shares[key]).cpu()) for key, parts in magnitudes.items()]


def branches(layer: Attended) -> dict[str, Tensor]:
    """The output of each branch that has heads as a map (B, H, W, channels)."""
    maps = layer.output.unflatten(1, (layer.H, layer.W)).split((layer.hilo.h_dim, layer.hilo.l_dim), dim=-1)
    return {branch: part for branch, part in zip(BRANCHES, maps) if part.shape[-1]}


def magnitude(maps: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W): magnitude of the orthonormal 2-D Fourier transform, frequency 0 at [H // 2, W // 2], averaged over
    channels."""
    return torch.fft.fftshift(_transform(maps).abs().mean(-1), dim=(1, 2))


def energy_above(maps: Tensor, frequency: float = HALF_NYQUIST) -> Tensor:
    """(B, H, W, C) -> (B,): share of the energy above a frequency in cycles per token, in any direction.

    The mean of each channel, frequency 0, is left out: it says how bright a map is, not how fine. NaN where nothing else is left.
    """
    energy = _transform(maps).abs().square().sum(-1)
    energy[:, 0, 0] = 0
    rows, columns = (torch.fft.fftfreq(n, device=maps.device) for n in maps.shape[1:3])
    return (energy * (torch.hypot(rows[:, None], columns) > frequency)).sum((1, 2)) / energy.sum((1, 2))


def radial_profile(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Centred magnitudes (H, W) -> frequencies (n,) in cycles per token and the mean magnitude (n,) of the ring around each.

    Rings are one step of the longer side wide, the first around frequency 0; corners lie beyond the Nyquist frequency of 0.5.
    """
    H, W = magnitude.shape
    rows, columns = (torch.fft.fftshift(torch.fft.fftfreq(n)) for n in (H, W))
    ring = (torch.hypot(rows[:, None], columns) * max(H, W)).round().long().flatten()
    count = torch.bincount(ring)
    values = torch.bincount(ring, magnitude.flatten().double()) / count
    return torch.arange(len(count))[count > 0] / max(H, W), values[count > 0].to(magnitude.dtype)


def mean_with_interval(values: Tensor) -> tuple[float, float, float]:
    """(n,) -> the mean and the ends of its 95 % confidence interval by Student's t, NaN for fewer than two values."""
    from scipy.stats import t  # scikit-learn brings it

    n, mean = len(values), values.double().mean().item()
    half = t.ppf(0.975, n - 1) * values.double().std().item() / n**0.5 if n > 1 else float("nan")
    return mean, mean - half, mean + half


def _transform(maps: Tensor) -> Tensor:
    return torch.fft.fft2(maps.float(), dim=(1, 2), norm="ortho")
