"""What TPUs would run, compiled by the TPU's own compiler on a machine without one.

Two environments take part: TensorFlow lowers (`lowering`), jax with libtpu compiles (`compiler`,
which imports neither TensorFlow nor this package's optimizers).
"""
