# SPDX-License-Identifier: Apache-2.0
# Semantic FPN with LITv2-S, 80k iterations of ADE20K: 44.3 mIoU. The other configurations are deltas of this one; "r50" is in the
# names because the release gave them so, no ResNet is in the model.
# The bases of the installed mmseg. "mmseg::" would name them, but mmengine does not find the maintained fork's package under it.
_base_ = [
    f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/{name}.py"
    for name in ("models/fpn_r50", "datasets/ade20k", "schedules/schedule_80k", "default_runtime")
]
custom_imports = dict(imports=["litv2.mm_backbone"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,  # the base's, of a ResNet
    backbone=dict(
        _delete_=True,
        type="LITv2",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="litv2_small"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
    decode_head=dict(num_classes=150),
)

optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=0, end=80000, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=16)
