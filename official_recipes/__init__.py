"""Runnable training recipes for the optimizers of ``tf_lbopt``."""
