"""Training without some layers at first."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence

import keras
from keras.layers import Layer

from tf_lbopt import _compat
from tf_lbopt._validation import integer, listed, shown
from tf_lbopt.callbacks.common import Logs, build_optimizer
from tf_lbopt.optimizers.trained import tensorflow_variable

_logger = logging.getLogger(__name__)

_EXPECTED = "a regular expression over layer paths, a layer, or a list of these"


class FreezeLayers(keras.callbacks.Callback):
    """Keeps some layers as they are in the first epochs, while the others train.

    With the layers next to the loss ("FC freezing") it helps large-batch training in place of a
    warm-up; the CLARS paper compares itself with it.

    The optimizer has slots for all variables from the start, so that nothing is lost when the
    layers join in: momentum of the others and `iterations` go on. Epochs count as in `fit`,
    `initial_epoch` included, so a resumed training goes on likewise. Between epochs, and from epoch
    `epochs` on, all layers have their former `trainable` flags.

    What a frozen layer is, Keras decides: it gets no gradients, counts in no global norm and does
    not decay. A frozen `BatchNormalization` also runs in inference mode and keeps its moving
    statistics. With `use_ema` frozen weights are averaged like all others, which changes them by
    rounding errors if the average overwrites them.

    Under gradient accumulation layers never join in within an update: if epoch `epochs` begins in
    mid-accumulation, they do after that update (under `steps_per_execution` this has to be between
    two executions). Adam and its kin correct moments by the number of all updates, too little for
    layers whose moments are still zero: the first steps of these are larger than the others' were.

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

    def __init__(self, layers: str | Layer | Sequence[str | Layer], epochs: int):
        super().__init__()
        self.layers = layers
        self.epochs = integer("epochs", epochs, low=1)
        self._entries = _checked_entries(layers)
        self._due = False
        self._matched: list[Layer] = []
        # The former ones, while layers are frozen.
        self._flags: list[tuple[Layer | keras.Variable, bool]] = []
        self._frozen_model: keras.Model | None = None  # whose train function leaves them out

    def on_train_begin(self, logs: Logs = None) -> None:
        """Finds the layers and builds the optimizer for all of them."""
        self.unfreeze()
        self._due = False
        build_optimizer(self)
        model = self.model
        found = {entry: list(_outermost(model, entry)) for entry in self._entries}
        missing = [entry for entry, layers in found.items() if not layers]
        if missing:
            names = (repr(e) if isinstance(e, str) else f"the layer {_path(e)}" for e in missing)
            _, *inside = _compat.all_layers(model)
            paths = dict.fromkeys(_path(layer) for layer in inside if layer.weights)
            raise ValueError(
                f"FreezeLayers found no layer for {listed(names)} in the model {model.name!r}. "
                f"Expected: {_EXPECTED}. Its layers with weights are: {listed(paths)}"
            )
        self._matched = list(dict.fromkeys(layer for layers in found.values() for layer in layers))
        _check(model, self._matched)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Freezes the layers, or lets them join in."""
        self._due = epoch >= self.epochs
        if not self._due or self._frozen_model is not None:
            self._freeze()
        self.on_train_batch_begin(0)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Lets the layers join in when the update that was under way is made."""
        if self._due and self._frozen_model and not _in_mid_accumulation(self.model.optimizer):
            self.unfreeze()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Gives the layers their flags back, for whatever looks at the model between epochs."""
        # `fit` ends with averages of the weights, if asked to, and pairs them by these flags.
        for owner, trainable in self._flags:
            owner.trainable = trainable
        self._flags = []

    def on_train_end(self, logs: Logs = None) -> None:
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
        self.on_epoch_end(0)
        if self._frozen_model is not None:
            model, self._frozen_model = self._frozen_model, None
            model.make_train_function(force=True)

    def _freeze(self) -> None:
        # A layer hands its flag down to all that is inside: so inner ones after outer ones, a
        # shared one after all that it is in, variables last.
        layers = [inner for layer in self._matched for inner in _compat.all_layers(layer)]
        owners = [*layers, *(variable for layer in layers for variable in layer.variables)]
        self._flags = self._flags or [(owner, owner.trainable) for owner in owners]
        for layer in self._matched:
            layer.trainable = False
        if self._frozen_model is None:
            self._frozen_model = self.model
            self.model.make_train_function(force=True)


def _check(model: keras.Model, layers: list[Layer]) -> None:
    """Raises unless the layers train, and others too, by an optimizer that knows them."""
    frozen = [_path(layer) for layer in layers if not layer.trainable]
    if frozen:
        raise ValueError(
            "FreezeLayers can only freeze layers that train, so that it can let them train "
            "again. Set `layer.trainable = True` and compile the model before `fit`, or leave "
            f"them out. Received layers with trainable=False: {listed(frozen)}"
        )
    trained = [variable for layer in layers for variable in layer.trainable_variables]
    paths = {id(tensorflow_variable(variable)): variable.path for variable in trained}
    if not paths:
        raise ValueError(
            "FreezeLayers has nothing to freeze: the layers have no trainable variables. "
            f"Received: {listed(map(_path, layers))}"
        )
    known = {id(tensorflow_variable(v)) for v in _compat.trained_variables(model.optimizer)}
    unknown = [path for key, path in paths.items() if key not in known]
    if unknown:
        raise ValueError(
            "FreezeLayers needs an optimizer that was built with the variables of the layers. "
            "Compile the model with a new optimizer while all of them are trainable. "
            f"Received {type(model.optimizer).__name__}, built without: {listed(unknown)}"
        )
    if len(paths) == len(model.trainable_variables):
        raise ValueError(
            "FreezeLayers must leave something to train. Received layers with all trainable "
            f"variables of the model: {listed(map(_path, layers))}"
        )


def _outermost(layer: Layer, entry: str | Layer) -> Iterator[Layer]:
    """The layers inside a layer that an entry fits, without those inside others that it fits."""
    for inner in _compat.sublayers(layer):
        names = (inner.name, _path(inner)) if isinstance(entry, str) else ()
        if inner is entry or any(re.search(entry, name) for name in names):
            yield inner
        else:
            yield from _outermost(inner, entry)


def _in_mid_accumulation(optimizer: keras.optimizers.Optimizer) -> bool:
    # Keras's iterations are micro-steps. Ours are updates, and micro-steps are counted apart.
    pending = [v for v in optimizer.variables if v.name == "pending_micro_steps"]
    if pending:
        return any(int(counter.numpy()) > 0 for counter in pending)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return int(optimizer.iterations.numpy()) % (optimizer.gradient_accumulation_steps or 1) > 0


def _path(layer: Layer) -> str:
    return layer.path or layer.name


def _checked_entries(layers: object) -> list[str | Layer]:
    expected = f"`layers` must be {_EXPECTED}. Received"
    entries = [layers] if isinstance(layers, str | Layer) else layers
    if isinstance(entries, bytes | dict) or not isinstance(entries, Iterable):
        kind = type(layers).__name__
        raise TypeError(f"{expected}: layers={shown(layers)} (of type {kind})")
    entries = list(entries)
    if not entries:
        raise ValueError(f"{expected}: layers={shown(layers)}")
    for entry in entries:
        if not isinstance(entry, str | Layer):
            kind = type(entry).__name__
            raise TypeError(f"{expected} an entry of type {kind}: {shown(entry)}")
        try:
            re.compile(entry if isinstance(entry, str) else "")
        except re.error as error:
            wrong = f"{shown(entry)}, which is no regular expression ({error})"
            raise ValueError(f"{expected}: {wrong}") from error
    return entries
