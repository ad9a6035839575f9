"""DLRM on click logs at large batches, on tf-models-official and TensorFlow Recommenders."""
