"""How an update is written: the in-place forms of a plain step, momentum and Adam's moments.

They take TensorFlow's fused kernels, which read and write every byte once. Where there is no kernel
(half precision, which is computed in float32) and in what XLA compiles they take the pure forms.
"""

import contextlib
from collections.abc import Iterator, Sequence

import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.moments import RunningMean, adam, moments
from tf_lbopt.rules.momentum import heavy_ball, velocity
from tf_lbopt.rules.norms import Gradient

# Below this size a scratch variable costs more than the passes that it saves.
_WORTH_FUSING = 1 << 14
# TensorFlow's kernel has NaN where v and ε are 0.
_LEAST_FUSED_EPSILON = 1e-30


class Writer:
    """Writes what an update computes, on one replica.

    In a graph it is used in the branch of an update that is sound. What XLA compiles has no
    branches: there ``where(sound, new, old)`` is written.

    A float16 element that overflows keeps its old value, and `complete` says so. In the other
    dtypes none does, after the checks of `tf_lbopt.rules.bounds`.

    Weights are computed from slots as they have been written: where a slot and a weight both come
    from the old ones, XLA on a CPU copies one of them first.

    Args:
        sound: Whether to write, a boolean scalar, where XLA compiles; else ``None``.
    """

    def __init__(self, sound: tf.Tensor | None = None):
        self._sound = sound
        self._written = [tf.constant(True) if sound is None else sound]
        self._fused_dtypes = (tf.float32, tf.float64) if sound is None else ()

    def complete(self) -> tf.Tensor:
        """Whether all was written, a boolean scalar."""
        return tf.reduce_all(tf.stack(self._written))

    def assign(self, variable: tf.Variable, new: tf.Tensor) -> None:
        """Writes values of the compute dtype, or of the variable's own."""
        if variable.dtype == tf.float16 or self._sound is not None:
            new = self._kept(new, variable)
        variable.assign(tf.cast(new, variable.dtype))

    @contextlib.contextmanager
    def restoring(self, variables: Sequence[tf.Variable]) -> Iterator[None]:
        """Within this block other code writes these variables; where unsound they get back theirs.

        Args:
            variables: All that it writes.
        """
        old = [] if self._sound is None else [v.read_value() for v in variables]
        yield
        for variable, value in zip(variables, old, strict=bool(old)):
            variable.assign(tf.where(self._sound, variable, value))

    def _kept(self, new: tf.Tensor, old: tf.Tensor | tf.Variable) -> tf.Tensor:
        """New values in the dtype of the old ones, which stay where they must not be replaced."""
        new = tf.cast(new, old.dtype)
        if old.dtype == tf.float16:
            finite = tf.math.is_finite(new)
            self._written.append(tf.reduce_all(finite))
            new = tf.where(finite, new, old)
        return new if self._sound is None else tf.where(self._sound, new, old)

    def subtract(self, variable: tf.Variable, direction: Gradient, rate: tf.Tensor) -> None:
        """``w ← w − rate · direction``; a sparse direction touches its own rows only."""
        dtype = direction.dtype
        if isinstance(direction, tf.IndexedSlices):
            rows = direction.values * rate
            if variable.dtype == dtype:
                variable.scatter_sub(tf.IndexedSlices(rows, direction.indices))
                return
            old = tf.gather(variable, direction.indices)
            new = self._kept(tf.cast(old, dtype) - rows, old)
            variable.scatter_update(tf.IndexedSlices(new, direction.indices))
        elif variable.dtype in self._fused_dtypes:
            tf.raw_ops.ResourceApplyGradientDescent(
                var=variable.handle, alpha=rate, delta=direction
            )
        else:
            self.assign(variable, tf.cast(variable, dtype) - rate * direction)

    def heavy_ball(
        self,
        variable: tf.Variable,
        buffer: tf.Variable | None,
        direction: Gradient,
        learning_rate: tf.Tensor,
        momentum: tf.Tensor,
    ) -> None:
        """`heavy_ball` on variables; ``buffer`` is ``None`` where ``momentum`` is 0."""
        if buffer is None:
            self.subtract(variable, direction, learning_rate)
        elif variable.dtype in self._fused_dtypes:
            tf.raw_ops.ResourceApplyMomentum(
                var=variable.handle,
                accum=buffer.handle,
                lr=learning_rate,
                grad=direction,
                momentum=momentum,
            )
        else:
            dtype = direction.dtype
            self.assign(buffer, heavy_ball(tf.cast(buffer, dtype), direction, momentum))
            self.assign(variable, tf.cast(variable, dtype) - learning_rate * tf.cast(buffer, dtype))

    def velocity(
        self,
        variable: tf.Variable,
        slot: tf.Variable | None,
        direction: Gradient,
        learning_rate: tf.Tensor,
        momentum: tf.Tensor,
        nesterov: bool = False,
    ) -> None:
        """`velocity` on variables; ``slot`` is ``None`` where ``momentum`` is 0."""
        if slot is None:
            self.subtract(variable, direction, learning_rate)
        elif variable.dtype in self._fused_dtypes:
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=variable.handle,
                accum=slot.handle,
                lr=learning_rate,
                grad=direction,
                momentum=momentum,
                use_nesterov=nesterov,
            )
        else:
            dtype = direction.dtype
            self.assign(slot, velocity(tf.cast(slot, dtype), direction, learning_rate, momentum))
            step = tf.cast(slot, dtype)
            if nesterov:
                step = velocity(step, direction, learning_rate, momentum)
            self.assign(variable, tf.cast(variable, dtype) + step)

    def adam(
        self,
        m: tf.Variable,
        v: tf.Variable,
        gradient: tf.Tensor,
        first: RunningMean,
        second: RunningMean,
        epsilon: tf.Tensor,
        offset: tf.Tensor | None = None,
        limit: float | None = None,
        least_epsilon: float = 0.0,
    ) -> tf.Tensor:
        """`adam` on the moment variables.

        Args:
            m: First moment.
            v: Second moment.
            gradient: g, dense, of the compute dtype.
            first: The running mean of β₁.
            second: That of β₂.
            epsilon: ε.
            offset: What to add to the direction (decay), or ``None``.
            limit: What no element of the direction is to exceed, or ``None``.
            least_epsilon: What ε is at least, for the choice of the kernel.

        Returns:
            ``direction + offset``, of the compute dtype.
        """
        dtype = gradient.dtype
        worthwhile = limit is None and m.shape.num_elements() >= _WORTH_FUSING
        if not (
            worthwhile and m.dtype in self._fused_dtypes and least_epsilon >= _LEAST_FUSED_EPSILON
        ):
            new = moments(tf.cast(m, dtype), tf.cast(v, dtype), gradient, first, second)
            for slot, value in zip((m, v), new, strict=True):
                self.assign(slot, value)
            direction = adam(tf.cast(m, dtype), tf.cast(v, dtype), first, second, epsilon)
            if limit is not None:
                direction = tf.clip_by_value(direction, -limit, limit)
            return direction if offset is None else direction + offset
        # The kernel subtracts `lr` times the direction from whatever variable it is given: with a
        # rate of -1, a scratch one that starts at the offset ends as direction + offset, in one
        # pass.
        scratch = _compat.anonymous_variable(m.shape, dtype)
        tf.raw_ops.AssignVariableOp(
            resource=scratch, value=tf.zeros(m.shape, dtype) if offset is None else offset
        )
        tf.raw_ops.ResourceApplyAdam(
            var=scratch,
            m=m.handle,
            v=v.handle,
            beta1_power=first.power,
            beta2_power=second.power,
            lr=tf.constant(-1.0, dtype),
            beta1=first.beta,
            beta2=second.beta,
            # Its ε is added before v is corrected: √v + ε√(1−β₂ᵗ) = √(1−β₂ᵗ)(√v̂ + ε).
            epsilon=epsilon * tf.sqrt(second.correction),
            grad=gradient,
        )
        return tf.raw_ops.ReadVariableOp(resource=scratch, dtype=dtype)
