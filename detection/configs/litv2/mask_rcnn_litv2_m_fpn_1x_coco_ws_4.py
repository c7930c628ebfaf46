# SPDX-License-Identifier: Apache-2.0
# Mask R-CNN with LITv2-M and HiLo windows of 4 x 4 in stage 3, which is cheaper: 46.5 box AP, 42.0 mask AP.
_base_ = "./mask_rcnn_litv2_m_fpn_1x_coco.py"

model = dict(backbone=dict(local_ws=(0, 0, 4, 1)))
