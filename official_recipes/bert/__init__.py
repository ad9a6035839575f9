"""BERT at large batches: pretraining in two phases, and fine-tuning on SQuAD."""
