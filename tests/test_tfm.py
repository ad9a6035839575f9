"""Registration with tf-models-official, and sub-batches of its tasks."""

import dataclasses
import importlib
import inspect

import numpy as np
import official.nlp.configs.experiment_configs
import official.vision  # noqa: F401  # registers the experiments
import pytest
import tensorflow as tf
import tf_keras
from conftest import strategy_of
from official.core import (
    actions,
    base_task,
    base_trainer,
    config_definitions,
    exp_factory,
    task_factory,
    train_utils,
)
from official.modeling import optimization
from official.modeling.optimization import optimizer_factory
from official.nlp.configs import bert, encoders
from official.nlp.tasks import masked_lm

import tf_lbopt.tfm
from official_recipes.common import tfm_training
from tf_lbopt import tf_keras as lbopt_tf_keras

pytestmark = pytest.mark.usefixtures("quick_configurations")

KEYS = list(tf_lbopt.tfm.REGISTRATIONS)


# -- registration ----------------------------------------------------------------------------------


def test_keys():
    wanted = "sngm vr_sgd vr_momentum vr_adam vr_lars vr_lamb clars extrap_sgd lbopt_lars"
    wanted += " lbopt_lamb"
    assert set(wanted.split()) <= set(KEYS)
    for key, row in tf_lbopt.tfm.REGISTRATIONS.items():
        assert optimizer_factory.LEGACY_OPTIMIZERS_CLS[key] is row.cls
        assert optimizer_factory.NEW_OPTIMIZERS_CLS[key] is row.cls


def test_stock_keys_stay_stock():
    for key in ("sgd", "adam", "adamw", "lamb", "lars", "rmsprop"):
        assert "tf_lbopt" not in optimizer_factory.LEGACY_OPTIMIZERS_CLS[key].__module__


def test_importing_twice_is_harmless():
    before = exp_factory.get_exp_config
    importlib.reload(tf_lbopt.tfm)
    assert exp_factory.get_exp_config is before


@pytest.mark.parametrize("key", KEYS)
def test_config_has_the_arguments_and_defaults_of_the_class(key):
    row = tf_lbopt.tfm.REGISTRATIONS[key]
    parameters = inspect.signature(row.cls).parameters
    arguments = {name: parameter.default for name, parameter in parameters.items()}
    # Norms by example are nothing for tf-models' training steps; `sub_batches` is the task's.
    for name in ("learning_rate", "norm_estimator", "sub_batches", "name"):
        arguments.pop(name, None)
    for name in parameters:
        if name.startswith(("use_ema", "ema_", "gradient_acc", "jit_compile", "mesh")):
            arguments.pop(name)
    config = row.config().as_dict()
    assert config.pop("name") == row.cls.__name__
    assert config == arguments
    assert getattr(tf_lbopt.tfm, f"{row.cls.__name__}Config") is row.config


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("experiment", ["resnet_imagenet", "bert/pretraining"])
@pytest.mark.quick(experiment="resnet_imagenet")
def test_stock_experiments_take_every_optimizer(key, experiment):
    prefix = "trainer.optimizer_config.optimizer"
    unset = (
        ",trainer.optimizer_config.warmup.polynomial.warmup_steps=2"
        ",trainer.optimizer_config.learning_rate.polynomial.decay_steps=8"
    )
    params = train_utils.parse_configuration(
        train_utils.ParseConfigOptions(
            experiment=experiment,
            config_file=[],
            params_override=f"{prefix}.type={key},{prefix}.{key}.weight_decay=0.25,"
            f"{prefix}.{key}.exclude_from_weight_decay=[bias],{prefix}.{key}.global_clipnorm=2.0"
            + (unset if experiment.startswith("bert") else ""),
        )
    )
    task = task_factory.get_task(params.task)
    optimizer = train_utils.create_optimizer(task, params)
    row = tf_lbopt.tfm.REGISTRATIONS[key]
    assert type(optimizer) is row.cls
    assert optimizer.weight_decay == 0.25
    assert optimizer.global_clipnorm == 2.0
    assert optimizer.gradient_accumulation_steps is None
    # What a run writes beside its checkpoints can be read again.
    again = exp_factory.get_exp_config(experiment)
    again.override(params.as_dict())
    assert again.as_dict() == params.as_dict()


def test_stock_experiments_are_else_as_they_were():
    extended = exp_factory.get_exp_config("resnet_imagenet")
    stock = exp_factory.get_exp_config.__wrapped__("resnet_imagenet")
    assert isinstance(extended.task, type(stock.task))
    as_dict = extended.as_dict()
    assert as_dict["task"].pop("sub_batches") == 1
    assert as_dict == stock.as_dict()
    with pytest.raises(KeyError):
        extended.override({"task": {"no_such_field": 1}})


def test_own_experiments():
    config = tf_lbopt.tfm.OptimizationConfig(
        {
            "optimizer": {"type": "clars", "clars": {"trust_coefficient": 0.1}},
            "learning_rate": {"type": "power"},
        }
    )
    assert isinstance(config, optimization.OptimizationConfig)
    assert config.optimizer.get().trust_coefficient == 0.1
    assert config.replace(ema=None).optimizer.get().trust_coefficient == 0.1


def test_moving_average_of_legacy_optimizers_is_refused():
    params = _experiment("lbopt_lars", ema={"average_decay": 0.9})
    with pytest.raises(ValueError, match="`ema` of tf-models works with its legacy optimizers"):
        train_utils.create_optimizer(task_factory.get_task(params.task), params)


# -- sub-batches -----------------------------------------------------------------------------------


@dataclasses.dataclass
class SmallConfig(config_definitions.TaskConfig):
    steps_per_call: int = 1


@task_factory.register_task_cls(SmallConfig)
class SmallTask(base_task.Task):
    """A small network on the standard training step."""

    def build_model(self):
        tf_keras.utils.set_random_seed(3)
        return tf_keras.Sequential(
            [
                tf_keras.layers.Dense(6, activation="tanh", input_shape=(5,)),
                tf_keras.layers.Dense(3, kernel_regularizer=tf_keras.regularizers.L2(0.01)),
            ]
        )

    def build_inputs(self, params, input_context=None):
        raise NotImplementedError

    def build_losses(self, labels, model_outputs, aux_losses=None):
        # Where all labels are 2: a finite loss with a gradient that is not.
        smooth = tf.where(tf.reduce_all(labels == 2), 0.0, 1.0)
        spoiled = tf.sqrt(smooth * (1.0 + tf.reduce_mean(model_outputs**2)))
        losses = tf_keras.losses.sparse_categorical_crossentropy(
            labels, model_outputs, from_logits=True
        )
        return tf.reduce_mean(losses) + tf.add_n(aux_losses or [0.0]) + spoiled

    def build_metrics(self, training=True):
        return [tf_keras.metrics.SparseCategoricalAccuracy(name="accuracy")]

    def train_step(self, inputs, model, optimizer, metrics=None):
        for _ in range(self.task_config.steps_per_call - 1):
            super().train_step(inputs, model, optimizer, metrics)
        return super().train_step(inputs, model, optimizer, metrics)


@exp_factory.register_config_factory("tf_lbopt_test_small")
def _small():
    return config_definitions.ExperimentConfig(
        task=SmallConfig(),
        trainer=config_definitions.TrainerConfig(
            optimizer_config=optimization.OptimizationConfig(
                {
                    "optimizer": {"type": "sgd", "sgd": {"momentum": 0.9}},
                    "learning_rate": {
                        "type": "polynomial",
                        "polynomial": {"initial_learning_rate": 0.1, "decay_steps": 8},
                    },
                }
            )
        ),
    )


def _experiment(
    kind, sub_batches=1, rate=0.1, experiment="tf_lbopt_test_small", fields=None, **override
):
    params = exp_factory.get_exp_config(experiment)
    params.override(
        {
            "task": {"sub_batches": sub_batches},
            "trainer": {
                "optimizer_config": {
                    "optimizer": {
                        "type": kind,
                        **({kind: fields} if fields else {}),
                    },
                    "learning_rate": {"polynomial": {"initial_learning_rate": rate}},
                    **override,
                }
            },
        }
    )
    return params


def _batches(steps=3, size=16):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        x = rng.normal(size=(size, 5)).astype("float32")
        yield x, (np.abs(x).sum(1) % 3).astype("int64")


def _shards(batch, replicas):
    return [
        tf.nest.map_structure(lambda a, d=d: np.split(a, replicas)[d], batch)
        for d in range(replicas)
    ]


def _features(batch):
    return batch[0] if isinstance(batch, tuple) else batch


def _train(params, replicas, batches, build=True):
    """Trains as tf-models' trainer does; returns weights, metrics, mean loss and optimizer."""
    batches = list(batches)
    strategy = strategy_of(replicas)
    with strategy.scope():
        task = task_factory.get_task(params.task)
        model = task.build_model()
        if build:
            model(tf.nest.map_structure(tf.constant, _features(batches[0])))
        optimizer = train_utils.create_optimizer(task, params)
        metrics = task.build_metrics(training=True)
        loss = tf_keras.metrics.Mean()

    @tf.function
    def step(batch):
        def on_replica(batch):
            logs = task.train_step(batch, model=model, optimizer=optimizer, metrics=metrics)
            loss.update_state(logs[task.loss])

        strategy.run(on_replica, args=(batch,))

    for batch in batches:
        shards = [tf.nest.map_structure(tf.constant, shard) for shard in _shards(batch, replicas)]
        step(
            strategy.experimental_distribute_values_from_function(
                lambda context, shards=shards: shards[context.replica_id_in_sync_group]
            )
            if replicas > 1
            else shards[0]
        )
    weights = [w.numpy() for w in model.trainable_variables]
    results = {metric.name: float(metric.result()) for metric in metrics}
    return weights, results, float(loss.result()), optimizer


@pytest.mark.parametrize(
    ("kind", "replicas"),
    [
        ("sgd", 1),
        ("adam", 2),
        ("adamw_experimental", 2),
        ("vr_lars", 1),
        ("vr_lars", 2),
        ("clars", 2),
        ("sngm", 1),
        ("extrap_sgd", 1),
        ("extrap_sgd", 2),
    ],
)
@pytest.mark.quick(kind=("vr_lars", "extrap_sgd"), replicas=2)
def test_sub_batches_are_as_good_as_replicas(kind, replicas, monkeypatch):
    """The update is traced once, not with every part, of which only the last one can have one."""
    expected, metrics, loss, _ = _train(_experiment(kind), 4, _batches())
    params, traced = _experiment(kind, sub_batches=4 // replicas), []
    if kind in tf_lbopt.tfm.REGISTRATIONS:
        cls = tf_lbopt.tfm.REGISTRATIONS[kind].cls
        update = cls._update_on_replica

        def counted(self, *arguments):
            traced.append(arguments)
            return update(self, *arguments)

        monkeypatch.setattr(cls, "_update_on_replica", counted)
    weights, seen, seen_loss, optimizer = _train(params, replicas, _batches())
    assert len(traced) == (replicas if kind in tf_lbopt.tfm.REGISTRATIONS else 0)
    for got, want in zip(weights, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    assert seen == pytest.approx(metrics)
    assert seen_loss == pytest.approx(loss, rel=1e-5)
    assert optimizer.iterations.numpy() == 3


@pytest.mark.parametrize("kind", ["vr_lars", "extrap_sgd"])
def test_a_failed_step_leaves_nothing_to_the_next(kind):
    """Its first part is in the accumulators when the second one ends in an error."""
    first, (x, labels), last = _batches(3)
    broken = x, np.concatenate([labels[:8], np.full(8, 7)])  # there are 3 classes

    def weights(batches, failures):
        params = _experiment(kind, sub_batches=2)
        with strategy_of(1).scope():
            task = task_factory.get_task(params.task)
            model = task.build_model()
            optimizer = train_utils.create_optimizer(task, params)
        failed = 0
        for batch in batches:
            try:
                task.train_step(tf.nest.map_structure(tf.constant, batch), model, optimizer)
            except tf.errors.InvalidArgumentError:
                failed += 1
        assert failed == failures
        return [w.numpy() for w in model.trainable_variables]

    for got, want in zip(weights([first, broken, last], 1), weights([first, last], 0), strict=True):
        np.testing.assert_array_equal(got, want)


def test_an_optimizer_that_does_not_accumulate_gets_the_mean_of_the_parts():
    """One that was made by hand."""

    def weights(**arguments):
        params = _experiment("sgd", sub_batches=4)
        with strategy_of(1).scope():
            task = task_factory.get_task(params.task)
            model = task.build_model()
            optimizer = lbopt_tf_keras.SNGM(0.1, **arguments)
            for batch in _batches():
                task.train_step(tf.nest.map_structure(tf.constant, batch), model, optimizer)
        assert optimizer.iterations.numpy() == 3
        return [w.numpy() for w in model.trainable_variables]

    for got, want in zip(weights(), weights(gradient_accumulation_steps=4), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_a_micro_step_in_a_micro_step():
    optimizer = lbopt_tf_keras.LARS(0.1, gradient_accumulation_steps=2)
    with (
        optimizer.micro_step(1),
        pytest.raises(ValueError, match=r"outermost block.*Received: micro_step\(0\)"),
        optimizer.micro_step(0),
    ):
        pytest.fail("the block was entered")
    with optimizer.micro_step(0):  # the first block is closed
        assert optimizer.gradient_accumulation_steps == 2


@pytest.mark.parametrize("number", [-1, 2])
def test_a_micro_step_that_does_not_exist(number):
    optimizer = lbopt_tf_keras.LARS(0.1, gradient_accumulation_steps=2)
    with (
        pytest.raises(ValueError, match=rf"from 0 to 1.*Received: number={number}"),
        optimizer.micro_step(number),
    ):
        pytest.fail("the block was entered")


def test_statistics_see_the_parts():
    """Else the update would not be weighted: every replica's examples are the same."""
    batches = [tuple(np.concatenate([a, a]) for a in batch) for batch in _batches()]
    one, *_ = _train(_experiment("vr_sgd"), 2, batches)
    two, *_ = _train(_experiment("vr_sgd", sub_batches=2), 2, batches)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("sub_batches", [1, 2])
@pytest.mark.quick(replicas=2, sub_batches=2)
def test_extrapolated_sgd_takes_its_gradients_elsewhere(replicas, sub_batches):
    """As a loop that takes the points by hand; without the past gradients it comes elsewhere."""
    k = replicas * sub_batches
    weights, *_, optimizer = _train(_experiment("extrap_sgd", sub_batches), replicas, _batches(4))
    assert optimizer.sub_batches == sub_batches
    assert optimizer.gradient_accumulation_steps is None
    task = task_factory.get_task(_experiment("sgd").task)
    model = task.build_model()
    variables = model.trainable_variables
    x = [v.numpy() for v in variables]
    velocity = [np.zeros_like(w) for w in x]
    past = [[np.zeros_like(w) for w in x] for _ in range(k)]
    for t, batch in enumerate(_batches(4)):
        rate = 0.1 - (0.1 - 1e-4) * t / 8
        own = []
        # A replica takes its parts in turn.
        for d, (features, labels) in enumerate(_shards(batch, k)):
            for variable, w, v, zeta in zip(variables, x, velocity, past[d], strict=True):
                variable.assign(w + 0.9 * v - rate / k * zeta)
            with tf.GradientTape() as tape:
                loss = task.build_losses(labels, model(features), model.losses)
            own.append([g.numpy() for g in tape.gradient(loss, variables)])
        mean = [np.mean(g, axis=0) for g in zip(*own, strict=True)]
        velocity = [0.9 * v - rate * g for v, g in zip(velocity, mean, strict=True)]
        x = [w + v for w, v in zip(x, velocity, strict=True)]
        past = own
    for got, want in zip(weights, x, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    at_home = _experiment("extrap_sgd", sub_batches, fields={"extrapolation_rate": 0.0})
    plain, *_ = _train(at_home, replicas, _batches(4))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(plain, x, strict=True))


def test_a_task_that_builds_its_model_late(monkeypatch):
    """Its variables exist before they are moved."""

    class Late(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = tf_keras.layers.Dense(3)

        def call(self, x, training=None):
            return self.dense(x)

    def build_model(task):
        tf_keras.utils.set_random_seed(3)
        return Late()

    monkeypatch.setattr(SmallTask, "build_model", build_model)
    weights, *_ = _train(_experiment("extrap_sgd"), 2, _batches(), build=False)
    expected, *_ = _train(_experiment("extrap_sgd"), 2, _batches())
    for got, want in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_extrapolated_sgd_in_a_task_that_knows_nothing_of_it_is_refused():
    stock = exp_factory.get_exp_config.__wrapped__("tf_lbopt_test_small")
    stock.trainer = _experiment("extrap_sgd").trainer
    with pytest.raises(ValueError, match=r"with optimizer\.extrapolated"):
        _train(stock, 1, _batches())


@pytest.mark.parametrize("sub_batches", [1, 2])
def test_an_extrapolated_optimizer_with_other_parts_than_the_task_is_refused(sub_batches):
    params = _experiment("extrap_sgd", sub_batches)
    task = task_factory.get_task(params.task)
    model = task.build_model()
    optimizer = lbopt_tf_keras.ExtrapSGD(0.1, sub_batches=4)
    with pytest.raises(
        ValueError,
        match=rf"sub_batches=task\.sub_batches={sub_batches} .*Received: sub_batches=4",
    ):
        task.train_step(next(_batches(1)), model, optimizer)


@pytest.mark.parametrize("kind", ["adam", "vr_lars", "extrap_sgd"])
@pytest.mark.parametrize("scale", ["dynamic", 8.0])
@pytest.mark.quick(kind="vr_lars", scale="dynamic")
def test_with_loss_scaling(kind, scale):
    def params(sub_batches):
        params = _experiment(kind, sub_batches)
        params.override({"runtime": {"mixed_precision_dtype": "float16", "loss_scale": scale}})
        return params

    expected, *_ = _train(params(1), 2, _batches())
    got, _, _, optimizer = _train(params(2), 1, _batches())
    assert isinstance(optimizer, tf_keras.mixed_precision.LossScaleOptimizer)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


# -- the trainer -----------------------------------------------------------------------------------


def _trainer(params, replicas, batches):
    """tf-models' own, with a folder-less checkpoint of what it saves."""
    batches = list(batches)
    with strategy_of(replicas).scope():
        task = task_factory.get_task(params.task)
        model = task.build_model()
        optimizer = train_utils.create_optimizer(task, params)
        dataset = (
            tf.data.Dataset.from_generator(
                lambda: iter(batches),
                output_signature=(tf.TensorSpec([16, 5]), tf.TensorSpec([16], tf.int64)),
            )
            .unbatch()
            .batch(16, drop_remainder=True)
            .repeat()
        )
        return base_trainer.Trainer(
            params,
            task,
            model,
            optimizer,
            evaluate=False,
            train_dataset=strategy_of(replicas).experimental_distribute_dataset(dataset),
        )


@pytest.mark.parametrize(("kind", "replicas"), [("lbopt_lars", 2), ("extrap_sgd", 2)])
@pytest.mark.quick(kind="extrap_sgd")
def test_a_skipped_update_is_a_step_but_none_of_the_schedule(kind, replicas, tmp_path):
    """Checkpoints keep both counts; the schedule goes by the updates that were made."""
    batches = list(_batches(4))
    batches[1] = batches[1][0], np.full(16, 2)
    params = _experiment(kind)
    trainer = _trainer(params, replicas, batches)
    logs = trainer.train(tf.constant(4))
    assert np.isfinite(logs["training_loss"].numpy())
    path = tf.train.CheckpointManager(
        trainer.checkpoint, str(tmp_path), max_to_keep=1, step_counter=trainer.global_step
    ).save()
    again = _trainer(params, replicas, _batches(1))
    again.checkpoint.restore(path)
    again.train(tf.constant(1))
    for one, steps in ((trainer, 4), (again, 5)):
        assert one.global_step.numpy() == steps
        assert one.optimizer.iterations.numpy() == steps - 1
        assert one.optimizer.skipped_updates.numpy() == 1
        rate = 0.1 - (0.1 - 1e-4) * (steps - 2) / 8  # of the last update, counted from 0
        assert one.optimizer.learning_rate.numpy() == pytest.approx(rate)
    expected, *_ = _train(params, replicas, [batches[i] for i in (0, 2, 3)] + list(_batches(1)))
    for got, want in zip(again.model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("trials", [-1, 0, 2])
def test_a_loss_that_is_not_finite_ends_the_run_whatever_the_optimizer_did(trials, tmp_path):
    params = _experiment("lbopt_lars")
    params.override({"trainer": {"recovery_max_trials": trials}})
    trainer = _trainer(params, 1, _batches(1))
    manager = tf.train.CheckpointManager(trainer.checkpoint, str(tmp_path), max_to_keep=1)
    manager.save()
    after_loop = actions.get_train_actions(params, trainer, str(tmp_path), manager)
    outputs = [{"training_loss": tf.constant(loss)} for loss in (np.nan, np.inf)]
    if trials < 0:
        assert after_loop == []
        return
    (check,) = after_loop
    for i in range(trials):
        trainer.global_step.assign(7)
        check(outputs[i % 2])
        assert trainer.global_step.numpy() == 0  # as in the checkpoint
    for output in outputs:
        with pytest.raises(RuntimeError, match=tfm_training._DIVERGED):
            check(output)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2x"])
def test_sub_batches_must_be_a_positive_integer(value):
    with pytest.raises(
        (TypeError, ValueError), match=r"`task\.sub_batches` must be an integer >= 1"
    ):
        task_factory.get_task(_experiment("sgd", sub_batches=value).task)


def test_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"task\.sub_batches=3 needs batches of a multiple of 3"):
        _train(_experiment("sgd", sub_batches=3), 1, _batches())


@pytest.mark.parametrize("kind", ["sgd", "vr_lars"])
def test_a_task_with_two_updates_a_step_is_refused(kind):
    params = _experiment(kind, sub_batches=2)
    params.override({"task": {"steps_per_call": 2}})
    with pytest.raises(ValueError, match="called it 2 times"):
        _train(params, 1, _batches())


# -- masked language modeling ---------------------------------------------------------------------


def _language_experiment(kind, sub_batches=1, scale_loss=True):
    task = masked_lm.MaskedLMConfig(
        scale_loss=scale_loss,
        model=bert.PretrainerConfig(
            encoder=encoders.EncoderConfig(
                bert=encoders.BertEncoderConfig(
                    vocab_size=30, num_layers=1, hidden_size=8, num_attention_heads=2,
                    intermediate_size=8, dropout_rate=0.0, attention_dropout_rate=0.0,
                    max_position_embeddings=8,
                )
            ),
            cls_heads=[
                bert.ClsHeadConfig(
                    inner_dim=8, num_classes=2, dropout_rate=0.0, name="next_sentence"
                )
            ],
        ),
    )  # fmt: skip
    task.train_data = bert_data = bert_pretrain_data()
    bert_data.use_next_sentence_label = True
    experiment = tf_lbopt.tfm.extended(
        config_definitions.ExperimentConfig(task=task, trainer=_small().trainer)
    )
    experiment.override(
        {
            "task": {"sub_batches": sub_batches},
            "trainer": {"optimizer_config": {"optimizer": {"type": kind}}},
        }
    )
    return experiment


def bert_pretrain_data():
    from official.nlp.data import pretrain_dataloader

    return pretrain_dataloader.BertPretrainDataConfig()


def _sentences(steps=2, size=8):
    rng = np.random.default_rng(1)
    for _ in range(steps):
        yield {
            "input_word_ids": rng.integers(1, 30, (size, 8)).astype("int32"),
            "input_mask": np.ones((size, 8), "int32"),
            "input_type_ids": np.zeros((size, 8), "int32"),
            "masked_lm_positions": rng.integers(0, 8, (size, 2)).astype("int32"),
            "masked_lm_ids": rng.integers(1, 30, (size, 2)).astype("int32"),
            "masked_lm_weights": rng.integers(0, 2, (size, 2)).astype("float32"),
            "next_sentence_labels": rng.integers(0, 2, (size, 1)).astype("int32"),
        }


@pytest.mark.parametrize(
    ("kind", "scale_loss"),
    [
        ("sgd", True),
        pytest.param("sgd", False, marks=pytest.mark.long),
        pytest.param("lbopt_lars", False, marks=pytest.mark.long),
        pytest.param("extrap_sgd", False, marks=pytest.mark.long),
        pytest.param("vr_lamb", False, marks=pytest.mark.long),
    ],
)
def test_masked_language_modeling(kind, scale_loss):
    def run(sub_batches, replicas):
        tf_keras.utils.set_random_seed(5)
        params = _language_experiment(kind, sub_batches, scale_loss)
        return _train(params, replicas, _sentences())

    expected, metrics, loss, _ = run(1, 2)
    got, seen, seen_loss, optimizer = run(2, 1)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert seen == pytest.approx(metrics, rel=1e-5)
    assert seen_loss == pytest.approx(loss, rel=1e-5)
    assert optimizer.iterations.numpy() == 2


def test_classes_are_those_of_tf_keras():
    assert tf_lbopt.tfm.REGISTRATIONS["vr_lars"].cls is lbopt_tf_keras.VRLARS
