# SPDX-License-Identifier: Apache-2.0
# Mask R-CNN with LITv2-S and HiLo windows of 4 x 4 in stage 3, which is cheaper: 44.7 box AP, 40.7 mask AP.
_base_ = "./mask_rcnn_litv2_s_fpn_1x_coco.py"

model = dict(backbone=dict(local_ws=(0, 0, 4, 1)))
