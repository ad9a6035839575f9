"""Benchmarks of the package; none is needed to use it."""
