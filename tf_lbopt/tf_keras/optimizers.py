"""The tf_keras classes: each follows from that of its name for Keras 3."""

import re

import tf_keras

from tf_lbopt.optimizers.base import OPTIMIZERS
from tf_lbopt.optimizers.base import LargeBatchOptimizer as Keras3Optimizer
from tf_lbopt.optimizers.documentation import common_texts
from tf_lbopt.optimizers.extrapolated import ExtrapolatedOptimizer as Keras3ExtrapolatedOptimizer
from tf_lbopt.tf_keras.base import LargeBatchOptimizer
from tf_lbopt.tf_keras.extrapolated import ExtrapolatedOptimizer

_COUNTERPARTS: dict[type, type] = {
    Keras3Optimizer: LargeBatchOptimizer,
    Keras3ExtrapolatedOptimizer: ExtrapolatedOptimizer,
}


def _counterpart(cls: type) -> type:
    """The class of the same name, declarations and mix-ins on the base class for tf_keras."""
    if cls not in _COUNTERPARTS:
        bases = tuple(_COUNTERPARTS.get(base, base) for base in cls.__bases__)
        declared = ("rule_class", "arguments", "former_names")
        namespace = {name: vars(cls)[name] for name in declared if name in vars(cls)}
        namespace |= {"__module__": __name__, "__doc__": _translated(cls.__doc__ or "")}
        made = type(cls)(cls.__name__, bases, namespace)
        _COUNTERPARTS[cls] = tf_keras.utils.register_keras_serializable(package="tf_lbopt")(made)
    return _COUNTERPARTS[cls]


def _translated(docstring: str) -> str:
    text = docstring.replace(
        common_texts(Keras3Optimizer.common_arguments),
        common_texts(LargeBatchOptimizer.common_arguments),
    )
    text = text.replace("keras.Variable(", "tf.Variable(")
    text = text.replace("keras.ops.convert_to_tensor(", "tf.convert_to_tensor(")
    apply = re.compile(r"optimizer\.apply\(\[(.*)\], \[w\]\)")
    return apply.sub(r"_ = optimizer.apply_gradients([(\1, w)])", text)


CLASSES: dict[str, type[LargeBatchOptimizer]] = {
    cls.__name__: _counterpart(cls) for cls in OPTIMIZERS.values()
}
"""All of them, by name."""

globals().update(CLASSES)
