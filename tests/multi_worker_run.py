"""One worker: the ResNet recipe, which at its end leaves this worker's step, weights and state.

Called with the file to write and the recipe's flags.
"""

import sys

import numpy as np

from official_recipes.common import tfm_training
from official_recipes.resnet50 import train

_runners = []


def _runner_class(original=tfm_training.runner_class):
    class Runner(original()):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            _runners.append(self)
            restored = self.checkpoint_manager.restored
            print(f"begins at {self.trainer.global_step.numpy()} from {restored}", file=sys.stderr)

    return Runner


def main(argv):
    tfm_training.runner_class = _runner_class
    exit_code = train.main(["train", *argv[2:]])
    for runner in _runners:
        trainer = runner.trainer
        weights = {
            f"weight/{variable.name}": variable.numpy()
            for variable in trainer.model.trainable_variables
        }
        slots = trainer.optimizer.variables
        if callable(slots):  # of a legacy optimizer
            slots = slots()
        state = {
            f"state/{index}/{variable.name}": variable.numpy()
            for index, variable in enumerate(slots)
        }
        np.savez(argv[1], step=trainer.global_step.numpy(), **weights, **state)
    return exit_code


if __name__ == "__main__":
    tfm_training.run_program(main, sys.argv)
