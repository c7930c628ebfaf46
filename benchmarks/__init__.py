# SPDX-License-Identifier: Apache-2.0
"""Benchmarks import each other by their names alone: a script finds them beside it, ``python -m benchmarks.paper`` by this."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
