"""How gradients become an update under tf.distribute: accumulation, reduction, statistics."""
