# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and figures, what it states beside what is counted and measured here: ``python -m benchmarks.paper NAME``."""
