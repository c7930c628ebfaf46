# SPDX-License-Identifier: Apache-2.0
# RetinaNet with LITv2-S and HiLo windows of 4 x 4 in stage 3, which is cheaper: 43.7 box AP.
_base_ = "./retinanet_litv2_s_fpn_1x_coco.py"

model = dict(backbone=dict(local_ws=(0, 0, 4, 1)))
