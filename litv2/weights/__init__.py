# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the published ones, downloading, safe reading, and finding the weights in them."""
