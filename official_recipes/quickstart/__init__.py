"""Compares large-batch optimizers on small image data, on CPU replicas, in about a minute."""
