# SPDX-License-Identifier: Apache-2.0
# Semantic FPN with LITv2-M, 80k iterations of ADE20K: 45.7 mIoU.
_base_ = "./litv2_s_fpn_r50_512x512_80k_ade20k.py"

model = dict(
    backbone=dict(
        depths=(2, 2, 18, 2),
        init_cfg=dict(checkpoint="litv2_medium"),
    ),
)
