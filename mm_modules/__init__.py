# SPDX-License-Identifier: Apache-2.0
"""Operators used by LITv2 that are also useful on their own."""

__version__ = "0.1.0"  # of the whole project; it is kept here because this package imports nothing
