# SPDX-License-Identifier: Apache-2.0
"""Runs of the classification trainer side by side: ``runs`` reads them, ``paired`` tests them on the same images."""
