"""LITv2 in mmdet and mmseg: the backbone, and the commands of detection/ and segmentation/. Needs OpenMMLab's packages."""
