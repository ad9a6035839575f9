"""Keras callbacks."""

from tf_lbopt.callbacks.batch_size_schedule import BatchSizeSchedule
from tf_lbopt.callbacks.batch_size_warmup import BatchSizeWarmup
from tf_lbopt.callbacks.end_period import EndPeriod
from tf_lbopt.callbacks.freeze_layers import FreezeLayers
from tf_lbopt.callbacks.gradient_noise_scale import GradientNoiseScale
from tf_lbopt.callbacks.gradient_signal_to_noise import GradientSignalToNoise
from tf_lbopt.callbacks.gradient_variance_factor import GradientVarianceFactor
from tf_lbopt.callbacks.skipped_updates import SkippedUpdates
from tf_lbopt.callbacks.swap_ema_weights import SwapEMAWeights

__all__ = [
    "BatchSizeSchedule",
    "BatchSizeWarmup",
    "EndPeriod",
    "FreezeLayers",
    "GradientNoiseScale",
    "GradientSignalToNoise",
    "GradientVarianceFactor",
    "SkippedUpdates",
    "SwapEMAWeights",
]
