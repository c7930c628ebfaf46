# SPDX-License-Identifier: Apache-2.0
"""LITv2 as the encoder of a segmenter of segmentation-models-pytorch: trains an FPN on random images."""

import segmentation_models_pytorch as smp
import torch

import litv2  # noqa: F401 (registers the models with timm)

torch.manual_seed(0)
model = smp.FPN("tu-litv2_small", encoder_weights=None, classes=3)  # encoder_weights=True for the published weights
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
criterion = smp.losses.DiceLoss("multiclass")
images, labels = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
for step in range(10):
    loss = criterion(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
