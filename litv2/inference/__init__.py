"""Models that only infer: folded, packed for the CPU, or whichever is fastest here."""
