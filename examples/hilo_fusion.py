# SPDX-License-Identifier: Apache-2.0
"""HiLo as cross attention between two images of a scene: trains a fusion of a visible and an infrared image, both random."""

import torch
from torch import nn
from torch.nn.functional import l1_loss

from hilo import HiLo2d


class Fusion(nn.Module):
    """Each image asks the other one: Hi-Fi heads at the same place, Lo-Fi heads everywhere."""

    def __init__(self, dim: int = 32, num_heads: int = 4):
        super().__init__()
        self.visible, self.infrared = nn.Conv2d(3, dim, 3, padding=1), nn.Conv2d(1, dim, 3, padding=1)
        self.from_visible, self.from_infrared = (HiLo2d(dim, num_heads, window_size=4) for _ in range(2))
        self.head = nn.Sequential(nn.GELU(), nn.Conv2d(2 * dim, dim, 1), nn.GELU(), nn.Conv2d(dim, 3, 3, padding=1))

    def forward(self, visible, infrared):  # (B, 3, H, W), (B, 1, H, W) -> (B, 3, H, W)
        visible, infrared = self.visible(visible), self.infrared(infrared)
        asked = visible + self.from_infrared(visible, context=infrared), infrared + self.from_visible(infrared, context=visible)
        return self.head(torch.cat(asked, dim=1))


torch.manual_seed(0)
model = Fusion()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
visible, infrared = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64)
for step in range(10):
    loss = l1_loss(model(visible, infrared), torch.maximum(visible, infrared))  # the brighter of both
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
