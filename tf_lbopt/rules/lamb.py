"""Layer-wise adaptive moments for batch training."""

import dataclasses

from tf_lbopt.rules.adam import AdamMoments
from tf_lbopt.rules.rule import Parameters, Step, Update, dense
from tf_lbopt.rules.trust_ratio import trust_ratio
from tf_lbopt.rules.writer import Writer


@dataclasses.dataclass(frozen=True)
class LAMB(AdamMoments):
    """LAMB: ``r = m̂ / (√v̂ + ε) + λ w``, ``w ← w − η ρ r`` with ``ρ = ‖w‖ / ‖r‖``."""

    takes_weight_norms = True

    default_trust_ratio: float = 1.0

    def update(self, parameters: Parameters, step: Step) -> Update:
        """One update; see the class."""
        means = self.running_means(parameters, step)
        epsilon = parameters.constants(self.epsilon)
        decay = parameters.constants(self.weight_decay or 0.0)
        weight_norms = parameters.weight_norms()

        def write(writer: Writer) -> None:
            directions, limit = [], self.direction_limit
            for index, (w, gradient) in enumerate(
                zip(parameters.weights(), parameters.gradients, strict=True)
            ):
                decayed = self.weight_decay and parameters.decayed[index]
                directions.append(
                    writer.adam(
                        parameters.slots["momentum"][index],
                        parameters.slots["velocity"][index],
                        dense(gradient),
                        *means[w.dtype],
                        epsilon[w.dtype],
                        offset=decay[w.dtype] * w if decayed else None,
                        limit=limit,
                        least_epsilon=self.epsilon,
                    )
                )
            ratios = trust_ratio(
                weight_norms,
                parameters.norms_of(parameters.adapted, directions)[0],
                default=self.default_trust_ratio,
            )
            rates = parameters.split(step.rates(ratios))
            for variable, direction, rate in zip(
                parameters.variables, directions, rates, strict=True
            ):
                writer.subtract(variable, direction, rate)

        ratio = max(1.0, self.default_trust_ratio)
        return Update(self.steps_fit(parameters, step, weight_norms, ratio), write)
