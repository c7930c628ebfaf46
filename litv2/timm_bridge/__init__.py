# SPDX-License-Identifier: Apache-2.0
"""LITv2 in timm: the models, and the import hook that registers them."""
