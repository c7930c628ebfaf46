"""Checkpoints: the published ones, downloading, safe reading, and finding the weights in them."""
