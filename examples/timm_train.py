# SPDX-License-Identifier: Apache-2.0
"""Trains LITv2 with timm's components, as in timm's train.py, on random images, so that it runs anywhere in seconds."""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import litv2  # noqa: F401 (registers the models)

torch.manual_seed(0)
model = timm.create_model("litv2_small", num_classes=10, img_size=64, drop_path_rate=0.1)  # pretrained=True for the published weights
optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.75)
scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=3, warmup_epochs=1, warmup_lr=1e-5)
ema = ModelEmaV3(model, decay=0.9)
images = torch.randn(16, *model.pretrained_cfg["input_size"])
labels = torch.arange(16) % 10

for epoch in range(epochs):
    scheduler.step(epoch)
    for batch in torch.randperm(16).split(8):
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
    print(f"epoch {epoch}: loss {loss.item():.3f}")
