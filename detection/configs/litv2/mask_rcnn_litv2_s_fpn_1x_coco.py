# SPDX-License-Identifier: Apache-2.0
# Mask R-CNN with LITv2-S, 12 epochs of COCO: 44.9 box AP, 40.8 mask AP. The other Mask R-CNN configurations are deltas of this one.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["litv2.mm_backbone"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="LITv2",
        drop_path_rate=0.2,
        out_norms=(1, 2, 3),  # the published detectors read stage 1 without a norm
        init_cfg=dict(type="Pretrained", checkpoint="litv2_small"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),  # every parameter with "norm" in its name
)
