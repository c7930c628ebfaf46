"""LITv2 in timm: the models under timm's names, and the hook that registers them when timm is imported."""
