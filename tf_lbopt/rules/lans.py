"""LAMB's sequel: normalized gradients, and Nesterov's momentum in two normalized parts."""

import dataclasses

import tensorflow as tf

from tf_lbopt.rules.adam import AdamMoments, direction_bound
from tf_lbopt.rules.rule import Parameters, Step, Update, dense
from tf_lbopt.rules.trust_ratio import trust_ratio
from tf_lbopt.rules.writer import Writer


@dataclasses.dataclass(frozen=True)
class LANS(AdamMoments):
    """LANS, with φ the identity: LAMB along the momentum and along the gradient.

    ``ĝ = g / ‖g‖``, of which m and v are the moments; ``r = m̂ / (√v̂ + ε) + λ w`` and
    ``c = ĝ / (√v̂ + ε) + λ w``; ``w ← w − η (β₁ ‖w‖/‖r‖ r + (1−β₁) ‖w‖/‖c‖ c)``.
    """

    takes_weight_norms = True

    default_trust_ratio: float = 1.0

    def direction_bound(self, dtype: tf.DType) -> float:
        """What no element of r and c exceeds together, without decay."""
        along_gradient = direction_bound(0.0, self.beta_2, self.epsilon, dtype)
        return super().direction_bound(dtype) + along_gradient

    def update(self, parameters: Parameters, step: Step) -> Update:
        """One update; see the class."""
        norms = parameters.own_norms()
        divisors = parameters.split(tf.where(norms > 0, norms, tf.ones_like(norms)))
        parameters = dataclasses.replace(
            parameters,
            gradients=[dense(g) / by for g, by in zip(parameters.gradients, divisors, strict=True)],
            gradient_norms=None,
            with_decay=None,
            norm_bounds=tf.ones_like(norms),
        )
        means = self.running_means(parameters, step)
        epsilon = parameters.constants(self.epsilon)
        decay = parameters.constants(self.weight_decay or 0.0)
        weight_norms = parameters.weight_norms()

        def write(writer: Writer) -> None:
            along_momentum, along_gradient = [], []
            for index, (w, gradient) in enumerate(
                zip(parameters.weights(), parameters.gradients, strict=True)
            ):
                first, second = means[w.dtype]
                velocity = parameters.slots["velocity"][index]
                decayed = self.weight_decay and parameters.decayed[index]
                offset = decay[w.dtype] * w if decayed else None
                along_momentum.append(
                    writer.adam(
                        parameters.slots["momentum"][index],
                        velocity,
                        gradient,
                        first,
                        second,
                        epsilon[w.dtype],
                        offset=offset,
                        limit=self.direction_limit,
                        least_epsilon=self.epsilon,
                    )
                )
                root = tf.sqrt(second.corrected(tf.cast(velocity, w.dtype)))
                c = tf.math.divide_no_nan(gradient, root + epsilon[w.dtype])
                along_gradient.append(c if offset is None else c + offset)
            lengths = parameters.norms_of(parameters.adapted, along_momentum, along_gradient)
            ratios_of_r, ratios_of_c = (
                trust_ratio(weight_norms, of_all, default=self.default_trust_ratio)
                for of_all in lengths
            )
            for variable, r, c, of_r, of_c in zip(
                parameters.variables,
                along_momentum,
                along_gradient,
                parameters.split(step.rates(self.beta_1 * ratios_of_r)),
                parameters.split(step.rates((1.0 - self.beta_1) * ratios_of_c)),
                strict=True,
            ):
                writer.subtract(variable, of_r * r + of_c * c, tf.constant(1.0, r.dtype))

        ratio = max(1.0, self.default_trust_ratio)
        return Update(self.steps_fit(parameters, step, weight_norms, ratio), write)
