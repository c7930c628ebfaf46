"""Files of weights: which are published, how they arrive, whether they may be read, and what is in them."""
