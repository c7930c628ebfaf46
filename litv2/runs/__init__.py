# SPDX-License-Identifier: Apache-2.0
"""What the programs of all three tasks share beside their work: how a run stops, fails, reports, and what it does about bad files."""
