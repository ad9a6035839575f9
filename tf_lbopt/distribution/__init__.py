"""The only room that knows `tf.distribute`: the road of one update."""
