"""Operators that LITv2 uses and that could be of use elsewhere."""

__version__ = "0.1.0"  # of the whole project: this package stands alone, and imports nothing
