# SPDX-License-Identifier: Apache-2.0
"""HiLo in a YOLO of Ultralytics, by a line of its YAML: trains the smallest YOLO11 on random images. A YAML of your own goes into
``ultralytics.YOLO`` likewise; keep the block in a module then, since Ultralytics' checkpoints refer to it.
Ultralytics is licensed under the AGPL-3.0; whether its terms suit you is for you to decide."""

import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn import tasks

from hilo import HiLo2d


class HiLoBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int):  # dim as it is in the model of this size: Ultralytics does not scale it
        super().__init__()
        self.norm, self.attention = nn.BatchNorm2d(dim), HiLo2d(dim, num_heads, window_size=2)
        self.ffn = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, 2 * dim, 1), nn.SiLU(), nn.Conv2d(2 * dim, dim, 1))

    def forward(self, x):  # (B, dim, H, W)
        x = x + self.attention(self.norm(x))
        return x + self.ffn(x)


torch.manual_seed(0)
tasks.HiLoBlock = HiLoBlock  # where Ultralytics looks for the names in a YAML
config = tasks.yaml_model_load("yolo11n.yaml")
config["backbone"][10] = [-1, 1, "HiLoBlock", [256, 8]]  # instead of YOLO11's own attention, [-1, 2, "C2PSA", [1024]]
model = tasks.DetectionModel(config, nc=3, verbose=False)
model.args = get_cfg()  # the weights of the losses
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
batch = dict(img=torch.rand(2, 3, 128, 128), batch_idx=torch.tensor([0, 1]), cls=torch.tensor([[0], [1]]))
batch["bboxes"] = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.4, 0.2, 0.4]])  # centre and size
for step in range(8):
    loss = model(batch)[0].sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
