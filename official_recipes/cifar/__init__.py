"""Trains the papers' small image classifiers with any optimizer, on Keras 3."""
