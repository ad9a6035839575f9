"""Parts that several recipes share: data readers, CPU replicas, flags and file writing."""
