"""Training without some layers at first."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras

from tf_lbopt import _compat, _validation
from tf_lbopt.distribution.accumulation import Accumulation
from tf_lbopt.optimizers.exclusion import tensorflow_variable

_logger = logging.getLogger(__name__)

_EXPECTED = "a regular expression over layer paths, a layer, or a list of these"


class FreezeLayers(keras.callbacks.Callback):
    """Keeps some layers as they are in the first epochs, while the others train.

    With the layers next to the loss ("FC freezing") this is what large-batch training has been
    helped with in place of a warm-up; the CLARS paper compares itself with it.

    The optimizer gets its slots for all variables when training begins, so that nothing is lost
    when the layers join in: momentum of the other layers and `iterations` go on. From epoch to
    epoch counts as `fit` counts, `initial_epoch` included, so a resumed training goes on likewise.
    Between epochs, and for good from epoch `epochs` on, all layers have their former `trainable`
    flags.

    What a frozen layer is, Keras decides: it gets no gradients, counts in no global norm and does
    not decay. A frozen `BatchNormalization` also runs in inference mode and keeps its moving
    statistics. Layers without weights are not affected. With `use_ema` frozen weights are averaged
    like all others, which changes them by rounding errors if the average overwrites them.

    Under gradient accumulation layers never join in within an update: if epoch `epochs` begins in
    mid-accumulation, they do after that update (under `steps_per_execution` this has to be between
    two executions). Adam and its kin correct their moments by the number of all updates; for the
    layers that join in, whose moments are still zero, that is too little, and their first steps are
    larger than the others' were.

    When `fit` raises in a frozen epoch, Keras calls no callback: the layers stay frozen until the
    callback is used again or `unfreeze` is called. Put this callback before `ModelCheckpoint`;
    whole models saved within a frozen epoch are saved with frozen layers.

    Args:
        layers: Which layers: a regular expression that is searched for in the layers' names and
            paths (``"backbone/block_1/conv"``), at any depth; a layer; or a list of these. Layers
            inside of them are frozen too.
        epochs: How many epochs, ≥ 1.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.
        ValueError: When training begins, if the model is not built, an entry of `layers` fits no
            layer of it, a layer is frozen already or unknown to the optimizer, or nothing is left
            to train.

    Example:
        >>> inner = keras.Sequential([keras.Input([2]), keras.layers.Dense(2)], name="body")
        >>> model = keras.Sequential([inner, keras.layers.Dense(1, name="fc")])
        >>> import tf_lbopt
        >>> model.compile(optimizer=tf_lbopt.SNGM(0.1), loss="mse")
        >>> before = model.get_weights()
        >>> x, y = keras.ops.ones([4, 2]), keras.ops.ones([4, 1])
        >>> history = model.fit(x, y, verbose=0, callbacks=[FreezeLayers("^fc$", epochs=1)])
        >>> [bool((a == b).all()) for a, b in zip(before, model.get_weights())]
        [False, False, True, True]

    References:
        Huo, Gu, Huang 2021, "Large Batch Optimization for Deep Learning Using New Complete
        Layer-Wise Adaptive Rate Scaling"; Gotmare, Keskar, Xiong, Socher 2018, "A Closer Look at
        Deep Learning Heuristics: Learning rate restarts, Warmup and Distillation".
    """

    def __init__(
        self, layers: str | keras.layers.Layer | Sequence[str | keras.layers.Layer], epochs: int
    ):
        super().__init__()
        self.layers = layers
        self.epochs = _validation.integer("epochs", epochs, low=1)
        self._entries = _checked_entries(layers)
        self._matched: list[keras.layers.Layer] = []
        self._flags: _TrainableFlags | None = None  # the former ones, while layers are frozen
        self._frozen_model: keras.Model | None = None  # whose train function leaves them out
        self._due = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the layers and builds the optimizer for all of them."""
        self.unfreeze()
        self._due = False
        if not self.model.built:
            raise ValueError(
                "FreezeLayers needs a model whose variables exist. Give it a `keras.Input` or call "
                f"it once before `fit`. Received the model {self.model.name!r}, which is not built."
            )
        self._matched = self._find()
        optimizer = self.model.optimizer
        if not optimizer.built:
            with self.model.distribute_strategy.scope():
                optimizer.build(self.model.trainable_variables)
        self._check()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Freezes the layers, or lets them join in."""
        self._due = epoch >= self.epochs
        if not self._due or self._frozen_model is not None:
            self._freeze()
        self._unfreeze_if_due()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Lets the layers join in when the update that was under way is made."""
        self._unfreeze_if_due()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Gives the layers their flags back, for whatever looks at the model between epochs."""
        # `fit` ends with averages of the weights, if asked to, and pairs them by these flags.
        self._restore_flags()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Leaves the model as it was found."""
        if self._due and self._frozen_model is not None:
            _logger.warning(
                "The layers of FreezeLayers stayed frozen beyond epoch %d: no update ended between "
                "two executions of the training step.", self.epochs,
            )  # fmt: skip
        self.unfreeze()

    def unfreeze(self) -> None:
        """Gives the layers their flags back and makes the model train them.

        Only needed after `fit` has raised.
        """
        self._restore_flags()
        if self._frozen_model is not None:
            model, self._frozen_model = self._frozen_model, None
            model.make_train_function(force=True)

    def _freeze(self) -> None:
        if self._flags is None:
            self._flags = _TrainableFlags(self._matched)
            for layer in self._matched:
                layer.trainable = False
        if self._frozen_model is None:
            self._frozen_model = self.model
            self.model.make_train_function(force=True)

    def _restore_flags(self) -> None:
        if self._flags is not None:
            self._flags.restore()
            self._flags = None

    def _unfreeze_if_due(self) -> None:
        if (
            self._due
            and self._frozen_model is not None
            and not _in_mid_accumulation(self.model.optimizer)
        ):
            self.unfreeze()

    # -- which layers ------------------------------------------------------------------------------

    def _find(self) -> list[keras.layers.Layer]:
        """The layers that fit, without those inside others that fit."""
        inside = list(_with_sublayers(self.model))[1:]
        fitting = {id(layer) for entry in self._entries for layer in _fitting(entry, inside)}
        missing = [entry for entry in self._entries if not _fitting(entry, inside)]
        if missing:
            paths = list(dict.fromkeys(_path(layer) for layer in inside if layer.weights))
            raise ValueError(
                f"FreezeLayers found no layer for {_validation.listed(map(_described, missing))} "
                f"in the model {self.model.name!r}. Expected: {_EXPECTED}. Its layers with weights "
                f"are: {_validation.listed(paths)}"
            )
        outermost: dict[int, keras.layers.Layer] = {}

        def walk(layer: keras.layers.Layer) -> None:
            for sublayer in _compat.sublayers(layer):
                if id(sublayer) in fitting:
                    outermost[id(sublayer)] = sublayer
                else:
                    walk(sublayer)

        walk(self.model)
        return list(outermost.values())

    def _check(self) -> None:
        frozen = [layer for layer in self._matched if not layer.trainable]
        if frozen:
            raise ValueError(
                "FreezeLayers can only freeze layers that train, so that it can let them train "
                "again. Set `layer.trainable = True` and compile the model before `fit`, or leave "
                "them out. Received layers with trainable=False: "
                f"{_validation.listed(map(_path, frozen))}"
            )
        variables = {
            id(tensorflow_variable(v)): v
            for layer in self._matched
            for v in layer.trainable_variables
        }
        if not variables:
            raise ValueError(
                "FreezeLayers has nothing to freeze: the layers have no trainable variables. "
                f"Received: {_validation.listed(map(_path, self._matched))}"
            )
        optimizer = self.model.optimizer
        known = {id(tensorflow_variable(v)) for v in _compat.trained_variables(optimizer)}
        unknown = [v.path for key, v in variables.items() if key not in known]
        if unknown:
            raise ValueError(
                "FreezeLayers needs an optimizer that was built with the variables of the layers. "
                "Compile the model with a new optimizer while all of them are trainable. "
                f"Received {type(optimizer).__name__}, built without: {_validation.listed(unknown)}"
            )
        if len(variables) == len(self.model.trainable_variables):
            raise ValueError(
                "FreezeLayers must leave something to train. Received layers with all trainable "
                f"variables of the model: {_validation.listed(map(_path, self._matched))}"
            )


class _TrainableFlags:
    """The `trainable` flags of layers, of what is inside them and of their variables."""

    def __init__(self, layers: Iterable[keras.layers.Layer]):
        walked = [inner for layer in layers for inner in _with_sublayers(layer)]
        self._layers = [(layer, layer.trainable) for layer in walked]
        self._variables = [(v, v.trainable) for layer in walked for v in layer.variables]

    def restore(self) -> None:
        """Sets them again."""
        # A layer hands its flag down to all that is inside: so inner ones after outer ones, a
        # shared one after all that it is in, variables last.
        for owner, trainable in (*self._layers, *self._variables):
            if owner.trainable != trainable:
                owner.trainable = trainable


def _with_sublayers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """A layer and all inside it; a shared one comes again after everything that it is in."""
    yield layer
    for sublayer in _compat.sublayers(layer):
        yield from _with_sublayers(sublayer)


def _in_mid_accumulation(optimizer: keras.optimizers.Optimizer) -> bool:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    steps = optimizer.gradient_accumulation_steps
    if not steps:
        return False
    accumulation = getattr(optimizer, "_accumulation", None)
    if not isinstance(accumulation, Accumulation):
        return int(optimizer.iterations.numpy()) % steps != 0
    # Ours counts updates, skipped ones apart.
    return optimizer.built and int(accumulation.micro_step.numpy()) > 0


def _fitting(entry: Any, layers: Iterable[keras.layers.Layer]) -> list[keras.layers.Layer]:
    if isinstance(entry, re.Pattern):
        return [x for x in layers if entry.search(x.name) or entry.search(_path(x))]
    return [layer for layer in layers if layer is entry]


def _path(layer: keras.layers.Layer) -> str:
    return layer.path or layer.name


def _described(entry: Any) -> str:
    return repr(entry.pattern) if isinstance(entry, re.Pattern) else f"the layer {_path(entry)}"


def _checked_entries(layers: Any) -> list[Any]:
    if isinstance(layers, str | keras.layers.Layer):
        layers = [layers]
    if isinstance(layers, bytes | dict) or not isinstance(layers, Iterable):
        raise TypeError(
            f"`layers` must be {_EXPECTED}. Received: layers={_validation.shown(layers)} "
            f"(of type {type(layers).__name__})"
        )
    entries = [_checked_entry(entry) for entry in layers]
    if not entries:
        raise ValueError(
            f"`layers` must be {_EXPECTED}. Received: layers={_validation.shown(layers)}"
        )
    return entries


def _checked_entry(entry: Any) -> Any:
    if isinstance(entry, keras.layers.Layer):
        return entry
    if not isinstance(entry, str):
        raise TypeError(
            f"`layers` must be {_EXPECTED}. "
            f"Received an entry of type {type(entry).__name__}: {_validation.shown(entry)}"
        )
    try:
        return re.compile(entry)
    except re.error as error:
        raise ValueError(
            f"`layers` must be {_EXPECTED}. "
            f"Received: {_validation.shown(entry)}, which is no regular expression ({error})"
        ) from error
