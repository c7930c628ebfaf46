# SPDX-License-Identifier: Apache-2.0
"""torchvision's RetinaNet on top of LITv2's pyramid: one training step and one prediction on a random image."""

import timm
import torch
from torchvision.models.detection import RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import litv2  # noqa: F401 (registers the models)


class Backbone(torch.nn.Module):
    out_channels = 256

    def __init__(self):
        super().__init__()
        self.body = timm.create_model("litv2_small", features_only=True, out_indices=(1, 2, 3))  # pretrained=True for the weights
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 256, LastLevelP6P7(256, 256))

    def forward(self, x):
        return self.fpn({str(i): level for i, level in enumerate(self.body(x))})


model = RetinaNet(Backbone(), num_classes=3, min_size=128, max_size=128)
target = dict(boxes=torch.tensor([[10.0, 20.0, 60.0, 90.0]]), labels=torch.tensor([1]))
losses = model([torch.rand(3, 128, 128)], [target])
sum(losses.values()).backward()
print({name: loss.item() for name, loss in losses.items()})
print({name: values.shape for name, values in model.eval()([torch.rand(3, 120, 100)])[0].items()})
