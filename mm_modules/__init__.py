"""Operators that LITv2 uses and that could be of use elsewhere."""
