"""Keras callbacks."""

from tf_lbopt.callbacks.skipped_updates import SkippedUpdates

__all__ = ["SkippedUpdates"]
