"""How large a batch is worth using: from the noise scale, or by trying.

``python -m tf_lbopt.batch_size <history.json or TensorBoard folder>`` prints the table of
`recommend` and writes its plot.
"""

from tf_lbopt.batch_size.measuring import Branch, CriticalBatchSize, measure_critical_batch_size
from tf_lbopt.batch_size.planning import (
    BatchSize,
    Recommendation,
    recommend,
    scale_learning_rate,
    steps_and_examples,
)

__all__ = [
    "BatchSize",
    "Branch",
    "CriticalBatchSize",
    "Recommendation",
    "measure_critical_batch_size",
    "recommend",
    "scale_learning_rate",
    "steps_and_examples",
]
