# SPDX-License-Identifier: Apache-2.0
"""HiLo at the bottom of a U-Net, from where every cell sees the whole image: trains a segmenter on noisy images of squares."""

import torch
from torch import nn
from torch.nn import functional as F

from hilo import HiLo2d


def convolution(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU())


class UNet(nn.Module):
    def __init__(self, dim: int = 16):
        super().__init__()
        self.outer, self.inner, self.bottom = convolution(3, dim), convolution(dim, 2 * dim), convolution(2 * dim, 4 * dim)
        self.norm, self.attention = nn.GroupNorm(1, 4 * dim), HiLo2d(4 * dim, num_heads=4, window_size=2)
        self.inner_up, self.outer_up, self.head = convolution(6 * dim, 2 * dim), convolution(3 * dim, dim), nn.Conv2d(dim, 1, 1)

    def forward(self, image):  # (B, 3, H, W) -> (B, 1, H, W), for sides that are multiples of 4
        outer = self.outer(image)
        inner = self.inner(F.max_pool2d(outer, 2))
        bottom = self.bottom(F.max_pool2d(inner, 2))
        bottom = bottom + self.attention(self.norm(bottom))
        inner = self.inner_up(torch.cat((inner, F.interpolate(bottom, scale_factor=2)), dim=1))
        return self.head(self.outer_up(torch.cat((outer, F.interpolate(inner, scale_factor=2)), dim=1)))


torch.manual_seed(0)
model, squares = UNet(), F.interpolate(torch.randint(2, (4, 1, 4, 4)).float(), scale_factor=16)
optimizer, images = torch.optim.AdamW(model.parameters(), lr=3e-3), squares + torch.randn(4, 3, 64, 64)
for step in range(10):
    loss = F.binary_cross_entropy_with_logits(model(images), squares)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
