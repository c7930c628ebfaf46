"""Compiles the extensions (to come)."""
