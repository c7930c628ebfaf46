# SPDX-License-Identifier: Apache-2.0
"""TIMMBackbone with LITv2 in a detector of mmdet and a segmenter of mmseg: one training step each, on random images."""

import torch
from mmdet.structures import DetDataSample
from mmengine import MODELS, Config, MMLogger, optim, structures
from mmengine.model import revert_sync_batchnorm
from mmseg.structures import SegDataSample

import litv2  # noqa: F401 (registers the models with timm)


def step(scope: str, base: str, sample, **data_preprocessor) -> dict:
    with MODELS.switch_scope_and_registry(scope) as registry:
        config = Config.fromfile(f"{__import__(scope).__path__[0]}/.mim/configs/_base_/models/{base}.py").model
        config.pop("pretrained", None)  # the weights of mmseg's ResNet
        config.backbone = dict(type="mmseg.TIMMBackbone", model_name="litv2_small", pretrained=False)  # True: the published weights
        config.neck.in_channels = [96, 192, 384, 768]
        config.data_preprocessor.update(data_preprocessor)
        model = revert_sync_batchnorm(registry.build(config))
    model.init_weights()
    batch = dict(inputs=[torch.randint(256, (3, 128, 128))], data_samples=[sample])
    losses = model.train_step(batch, optim.OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-4)))
    return {name: value.item() for name, value in losses.items()}


MMLogger.get_instance("mmengine", log_level="WARNING")
box = structures.InstanceData(bboxes=torch.tensor([[10.0, 20, 60, 90]]), labels=torch.tensor([1]))
print(step("mmdet", "retinanet_r50_fpn", DetDataSample(metainfo=dict(img_shape=(128, 128)), gt_instances=box)))
print(step("mmseg", "fpn_r50", SegDataSample(gt_sem_seg=structures.PixelData(data=torch.randint(19, (1, 128, 128)))), size=(128, 128)))
