# SPDX-License-Identifier: Apache-2.0
"""LITv2 as the backbone of Hugging Face's RT-DETR and Mask2Former: trains small ones on random images. Hugging Face warns that it knows
Mask2Former with Swin only.

With published weights: ``detector.model.backbone.model = TimmBackbone.from_pretrained("litv2_small", out_indices=(1, 2, 3))``.
"""

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

import litv2  # noqa: F401 (registers the models with timm)


def backbone(*stages: int) -> TimmBackboneConfig:
    return TimmBackboneConfig(backbone="litv2_small", out_indices=stages)


def train(name: str, model: torch.nn.Module, **batch) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(6):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{name}, step {step}: loss {loss.item():.3f}")


torch.manual_seed(0)
small = dict(decoder_layers=2, num_queries=20, num_labels=3)
images, classes = torch.randn(2, 3, 64, 64), [torch.tensor([0]), torch.tensor([1])]
detector = RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone(1, 2, 3), encoder_in_channels=[192, 384, 768], **small))
boxes = torch.tensor([[0.5, 0.5, 0.4, 0.6]])  # centre and size
train("RT-DETR", detector, pixel_values=images, labels=[dict(class_labels=label, boxes=boxes) for label in classes])
segmenter = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone(0, 1, 2, 3), **small))
train("Mask2Former", segmenter, pixel_values=images, class_labels=classes, mask_labels=[torch.ones(1, 64, 64).tril()] * 2)
