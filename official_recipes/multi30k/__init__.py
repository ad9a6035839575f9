"""Trains a small transformer to translate, with any optimizer, on Keras 3."""
