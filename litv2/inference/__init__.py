# SPDX-License-Identifier: Apache-2.0
"""Inference-only forms of the models: folded, packed for the CPU, or whichever is fastest on this machine."""
