"""ResNet-50 and ResNet-18 at large batches, on tf-models-official."""
