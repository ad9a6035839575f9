"""Large-batch optimizers for TensorFlow and Keras, exact under `tf.distribute`."""

from tf_lbopt._version import __version__
from tf_lbopt.optimizers import LAMB, LARS, SNGM
