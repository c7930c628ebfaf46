# SPDX-License-Identifier: Apache-2.0
# Semantic FPN with LITv2-B, 80k iterations of ADE20K: 47.2 mIoU.
_base_ = "./litv2_s_fpn_r50_512x512_80k_ade20k.py"

model = dict(
    backbone=dict(
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="litv2_base"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
