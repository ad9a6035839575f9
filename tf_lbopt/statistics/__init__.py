"""What is known of the sub-batches of one update."""
