"""Trains an LSTM language model with any optimizer, on Keras 3."""
