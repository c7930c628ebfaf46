# SPDX-License-Identifier: Apache-2.0
"""Blocks like Restormer's (arXiv 2111.09881) with HiLo on maps of 256 x 256: trains a denoiser on random images.

Restormer attends across channels, as 65536 positions are too many. Here Lo-Fi heads see a map of 16 x 16, Hi-Fi heads windows of 8 x 8.
"""

import torch
from torch import nn
from torch.nn import functional as F

from hilo import HiLo


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, expansion: int = 2):
        super().__init__()
        hidden = expansion * dim
        self.norm1, self.attention = nn.LayerNorm(dim), HiLo(dim, num_heads, window_size=8, pool_size=16)
        self.norm2, self.expand, self.reduce = nn.LayerNorm(dim), nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)

    def forward(self, x):  # (B, H, W, dim)
        x = x + self.attention(self.norm1(x))
        gate, value = self.depthwise(self.expand(self.norm2(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).chunk(2, dim=-1)
        return x + self.reduce(F.gelu(gate) * value)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 16), Block(16, num_heads=2), Block(16, num_heads=2), nn.Linear(16, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
clean = F.interpolate(torch.rand(1, 3, 16, 16), size=256, mode="bicubic").permute(0, 2, 3, 1)  # (1, 256, 256, 3)
noisy = clean + 0.2 * torch.randn_like(clean)
for step in range(6):
    loss = F.l1_loss(noisy + model(noisy), clean)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
