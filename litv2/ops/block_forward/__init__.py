"""A whole block of the network in inference."""
