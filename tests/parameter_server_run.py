"""Makes optimizers under a ParameterServerStrategy; prints what each says, a line of JSON.

In a process of its own, since the strategy connects TensorFlow to a cluster. Called by
`test_replicas.py`.
"""

import json
import os
import socket

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import tf_lbopt
import tf_lbopt.tf_keras

MAKERS = {
    "variance": lambda: tf_lbopt.VRSGD(0.1),
    "mean norm": lambda: tf_lbopt.CLARS(0.1),
    "per-example norms": lambda: tf_lbopt.CLARS(0.1, norm_estimator="per_example"),
    "extrapolation": lambda: tf_lbopt.ExtrapSGD(0.1),
    "local steps": lambda: tf_lbopt.PostLocalSGD(keras.optimizers.SGD(0.1), 1, 2),
    "around": lambda: tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1)),
    "accumulation": lambda: tf_lbopt.SNGM(0.1, gradient_accumulation_steps=2),
    "tf_keras variance": lambda: tf_lbopt.tf_keras.VRSGD(0.1),
    "tf_keras extrapolation": lambda: tf_lbopt.tf_keras.ExtrapSGD(0.1),
    "tf_keras accumulation": lambda: tf_lbopt.tf_keras.SNGM(0.1, gradient_accumulation_steps=2),
    "mean gradient": lambda: tf_lbopt.SNGM(0.1),
    "tf_keras mean gradient": lambda: tf_lbopt.tf_keras.SNGM(0.1),
}


def _free_address() -> str:
    with socket.socket() as own:
        own.bind(("localhost", 0))
        return f"localhost:{own.getsockname()[1]}"


def _said(make) -> str | None:
    try:
        make()
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    cluster = tf.train.ClusterSpec({job: [_free_address()] for job in ("worker", "ps")})
    servers = [tf.distribute.Server(cluster, job_name=job, task_index=0) for job in cluster.jobs]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    with tf.distribute.ParameterServerStrategy(resolver).scope():
        said = {name: _said(make) for name, make in MAKERS.items()}
    print(json.dumps(said), flush=True)
    os._exit(0)  # servers can not be stopped
