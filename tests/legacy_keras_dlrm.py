"""Tests of the DLRM task, which needs TF_USE_LEGACY_KERAS=1 before TensorFlow is asked for Keras.

So they run in a process of their own: `test_dlrm.py` calls pytest on this file.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from conftest import strategy_of
from harness import graph_nodes
from harness_recipes import assert_deviations_are_in_the_readme
from harness_tpu import recipe_step
from official.core import task_factory, train_utils
from official.recommendation.ranking.configs import config as stock_config
from official.recommendation.ranking.data import data_pipeline
from sklearn.metrics import log_loss, roc_auc_score
from test_sparse_memory import table_sized_outputs

from official_recipes.common import tfm_training
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.dlrm import experiments, inputs, prepare_data, serving, train
from official_recipes.dlrm.optimizers import EmbeddingsApart, PlateauPolynomial

pytestmark = pytest.mark.usefixtures("quick_configurations")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "official_recipes" / "dlrm" / "configs").glob("*.yaml"))
PUBLISHED = {"32k": 32768, "64k": 65536, "128k": 131072, "256k": 262144, "512k": 524288}
TABLE_ROWS = 1_000_000
train._register()


def test_deviations_from_tf_models():
    assert_deviations_are_in_the_readme(train.EXPERIMENT, "dlrm_criteo", "dlrm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks") / "data"
    arguments = ["--synthetic_rows=6000", f"--output_dir={folder}", "--shards=4"]
    assert prepare_data.main(["prepare_data", *arguments, "--min_frequency=2"]) == 0
    return folder


def _params(*files, override=None, sub_batches=None, mode="train_and_eval"):
    options = tfm_training.Options(
        experiment=train.EXPERIMENT,
        config_file=tuple(str(f) for f in files),
        params_override=override,
        mode=mode,
        model_dir="unused",
        tpu=None,
        cpu_replicas=None,
        sub_batches=sub_batches,
    )
    return tfm_training.parse_params(options), options


def _task(kind="vr_sgd", embeddings=None, sub_batches=1, sizes=(50, 60, 70), **model):
    params, _ = _params(sub_batches=sub_batches)
    params.task.model.override(
        {
            "num_dense_features": 3,
            "vocab_sizes": list(sizes),
            "embedding_dim": 4,
            "bottom_mlp": [8, 4],
            "top_mlp": [8, 1],
            **model,
        }
    )
    params.trainer.optimizer_config.override(
        {
            "optimizer": {"type": kind},
            "embeddings": {"optimizer": {"type": embeddings}},
            "learning_rate": {"type": "constant", "constant": {"learning_rate": 0.3}},
            "warmup": {"type": None},
        }
    )
    tf_keras.utils.set_random_seed(3)
    return params, task_factory.get_task(params.task)


def _batch(rows, sizes=(50, 60, 70), seed=0, upper=None):
    rng = np.random.default_rng(seed)
    features = {
        "dense_features": tf.constant(rng.normal(size=(rows, 3)), tf.float32),
        "sparse_features": {
            str(i): tf.constant(rng.integers(0, upper or size, rows), tf.int32)
            for i, size in enumerate(sizes)
        },
    }
    return features, tf.constant(rng.integers(0, 2, rows), tf.float32)


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configurations_are_consistent(file):
    from official.modeling import optimization

    params, options = _params(file)
    widths = params.task.model.embedding_dim
    params.task.model.vocab_sizes = [100] * (len(widths) if isinstance(widths, list) else 26)
    train._check(params, options)
    trainer, config = params.trainer, params.trainer.optimizer_config
    assert trainer.summary_interval % trainer.steps_per_loop == 0
    assert trainer.train_steps % trainer.validation_interval == 0
    if config.learning_rate.type == "constant":
        config = config.embeddings
    rate = optimization.OptimizerFactory(config).build_learning_rate()
    decay = config.learning_rate.get()
    warmup = config.warmup.get().warmup_steps
    peak = decay.initial_learning_rate
    assert [float(rate(step)) for step in (0, warmup, decay.decay_start)] == pytest.approx(
        [0, peak, peak]
    )
    assert float(rate(warmup // 2)) == pytest.approx(peak * (warmup // 2) / warmup)
    gone = min(1, (trainer.train_steps - decay.decay_start) / decay.decay_steps)
    end = decay.end_learning_rate + (peak - decay.end_learning_rate) * (1 - gone) ** decay.power
    assert float(rate(trainer.train_steps)) == pytest.approx(end, rel=1e-3, abs=1e-6)
    batch = params.task.train_data.global_batch_size
    if file.stem.startswith("vrgd"):
        assert batch == PUBLISHED[file.stem.removeprefix("vrgd_")]
        assert trainer.train_steps == stock_config.NUM_TRAIN_EXAMPLES // batch
        assert peak == pytest.approx(28 * (batch / 32768) ** 0.5, abs=0.005)
        assert config.optimizer.get().gamma == 0.1


def test_there_are_configurations_for_the_batches_of_the_paper():
    assert {f"vrgd_{name}" for name in PUBLISHED} < {file.stem for file in CONFIGS}


def test_the_configuration_of_tf_models_has_its_values():
    """Adam with its own rate, SGD for the embeddings, and the least of their rates, 0.01."""
    from official.core import exp_factory
    from official.modeling import optimization
    from official.recommendation.ranking import common

    file = ROOT / "official_recipes" / "dlrm" / "configs" / "adam_sgd_16k.yaml"
    ours, stock = _params(file)[0], exp_factory.get_exp_config("dlrm_criteo")
    names = "embedding_dim", "bottom_mlp", "top_mlp", "interaction", "concat_dense"
    for name in names:
        assert getattr(ours.task.model, name) == getattr(stock.task.model, name)
    batch = ours.task.train_data.global_batch_size
    assert batch == stock.task.train_data.global_batch_size
    for name in ("train_steps", "validation_interval"):
        assert getattr(ours.trainer, name) == getattr(stock.trainer, name)
    given, config = stock.trainer.optimizer_config, ours.trainer.optimizer_config
    kinds = config.optimizer.type, config.embeddings.optimizer.type
    assert kinds == (given.dense_optimizer.lower(), given.embedding_optimizer.lower())
    assert config.learning_rate.get().learning_rate == tf_keras.optimizers.Adam().learning_rate
    fields = {name: getattr(given.lr_config, name) for name in given.lr_config.as_dict()}
    theirs = common.WarmUpAndPolyDecay(batch_size=batch, **fields)
    rate = optimization.OptimizerFactory(config.embeddings).build_learning_rate()
    for step in (0, 1, 3999, 8000, 70_000, 80_000, 99_990, 100_001, 256_054):
        assert float(rate(step)) == pytest.approx(float(theirs(step)), abs=0.0101)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.model.interaction=sum", "task.model.interaction: expected one of|one of dot, cross"),
        ("task.model.bottom_mlp=[8]", "widths that end in embedding_dim"),
        ("task.model.top_mlp=[8]", "widths that end in 1"),
        ("task.model.embedding_dim=1", "an integer of at least 2, or a list of 2, one for each"),
        ("task.model.embedding_dim=wide", "an integer of at least 2, or a list of 2, one for each"),
        ("task.model.embedding_dim=[8,8,8]", "a list of 2, one for each column, received .8, 8, 8"),
        ("task.model.embedding_dim=[128,8]", "one width for all columns with interaction=dot"),
        ("task.model.multi_hot_sizes=[1]", "multi_hot_sizes: expected 2 positive integers|2 posi"),
        ("task.model.multi_hot_sizes=[1,0]", "2 positive integers, one for each column"),
        ("task.model.dcn_num_layers=0", "dcn_num_layers: a positive integer"),
        ("task.model.dcn_low_rank_dim=0", "dcn_low_rank_dim: a positive integer"),
        ("task.model.vocab_sizes=[3,0]", "positive sizes"),
        ("task.model.vocab_sizes=[]", "dataset.json of prepare_data.py beside input_path"),
        (
            "task.model.interaction=multi_layer_dcn,runtime.mixed_precision_dtype=mixed_bfloat16",
            "mixed_precision_dtype: float32 with interaction=multi_layer_dcn",
        ),
        ("trainer.train_tf_while_loop=true", "train_tf_while_loop: false"),
        ("trainer.optimizer_config.optimizer.type=lars", "lbopt_lars"),
        ("trainer.optimizer_config.embeddings.optimizer.type=lars", "lbopt_lars"),
    ],
)
def test_parameters_that_can_not_be(override, said):
    params, options = _params(override="task.model.vocab_sizes=[3,4]")
    from official.modeling import hyperparams

    params = hyperparams.override_params_dict(params, override, is_strict=True)
    with pytest.raises(FlagValueError, match=said):
        train._check(params, options)


def test_embeddings_need_sub_batches_too():
    kind = "trainer.optimizer_config.embeddings.optimizer.type=vr_sgd"
    params, options = _params(override=f"trainer.optimizer_config.optimizer.type=sgd,{kind}")
    tfm_training.check_batches(params, options, 2)
    with pytest.raises(FlagValueError, match=r"at least 2 sub-batches .* the optimizer vr_sgd"):
        tfm_training.check_batches(params, options, 1)


def test_sizes_come_from_the_record_beside_the_data(data):
    for mode, split in (("train", "train"), ("eval", "validation")):
        params, options = _params(
            override=f"task.{split}_data.input_path={data}/{split}*", mode=mode
        )
        train._check(params, options)
        recorded = json.loads((data / "dataset.json").read_text())["vocab_sizes"]
        assert params.task.model.vocab_sizes == recorded


def test_columns_that_are_not_those_of_the_data(data):
    override = f"task.train_data.input_path={data}/train*,task.model.num_dense_features=4"
    params, options = _params(override=override)
    with pytest.raises(FlagValueError, match="num_dense_features=13 and 26 vocab_sizes"):
        train._check(params, options)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [*[(k, 4 + 16) for k in ("sgd", "vr_sgd", "vr_adam", "sngm", "adam")]]
    + [(k, 4 + 6) for k in ("vr_lars", "vr_lamb", "lbopt_lamb", "lans", "clars", "lamb")],
)
def test_layer_wise_optimizers_have_no_weights_of_zeros(kind, rows):
    """Half of the products are zeros else, and their weights count in the norm for ever."""
    params, task = _task(kind, interaction="dot")
    train._check(params, _params()[1])
    model = task.build_model()
    assert [v.shape for v in model.dense_trainable_variables if v.shape[0] == rows] == [(rows, 8)]


def test_the_default_is_the_configuration_for_64k():
    default, named = _params()[0], _params(ROOT / "official_recipes/dlrm/configs/vrgd_64k.yaml")[0]
    for params in (default, named):
        params.task.train_data.input_path = params.task.validation_data.input_path = ""
    assert default.as_dict() == named.as_dict()


def test_plateau():
    schedule = PlateauPolynomial(2.0, decay_start=10, decay_steps=4, power=2)
    rates = [float(schedule(tf.constant(step))) for step in (0, 10, 11, 12, 14, 99)]
    assert rates == pytest.approx([2, 2, 2 * 0.75**2, 0.5, 0, 0])
    assert float(PlateauPolynomial.from_config(schedule.get_config())(12)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="decay_steps=0"):
        PlateauPolynomial(1.0, 1, 0)


# -- input -----------------------------------------------------------------------------------------


def _data_config(data, split, batch, **more):
    return experiments.DataConfig(
        input_path=f"{data}/{split}*",
        global_batch_size=batch,
        is_training=split == "train",
        **more,
    )


def _sizes(data):
    return json.loads((data / "dataset.json").read_text())["vocab_sizes"]


def test_the_reader_of_tf_models_reads_the_same(data):
    """In the order of the files; there is one for validation."""
    given = stock_config.DataConfig(
        input_path=f"{data}/validation*",
        global_batch_size=50,
        is_training=False,
        num_shards_per_host=1,
    )
    stock = data_pipeline.CriteoTsvReader(given.input_path, given, 13, _sizes(data))(None)
    ours = inputs.click_logs(_data_config(data, "validation", 50), _sizes(data), 13)
    seen = 0
    for (stock_features, stock_labels), (features, labels) in zip(stock, ours, strict=False):
        np.testing.assert_array_equal(stock_labels[:, 0], labels)
        np.testing.assert_array_equal(stock_features["dense_features"], features["dense_features"])
        for name, column in stock_features["sparse_features"].items():
            np.testing.assert_array_equal(column, features["sparse_features"][name])
        seen += 1
    rows = json.loads((data / "dataset.json").read_text())["rows"]["validation"]
    assert seen == rows // 50 > 3


def test_training_rows_come_in_another_order_each_epoch(data):
    rows = json.loads((data / "dataset.json").read_text())["rows"]["train"]
    batches = iter(
        inputs.click_logs(
            _data_config(data, "train", rows, shuffle_buffer_size=rows), _sizes(data), 13
        )
    )
    first, second = (next(batches)[0]["dense_features"].numpy() for _ in range(2))
    assert np.any(first != second)
    np.testing.assert_array_equal(*(x[np.lexsort(x.T)] for x in (first, second)))


@pytest.mark.parametrize("replicas", [1, 2])
def test_every_row_is_evaluated_once(data, replicas):
    """And the last step's batches, filled up, are there for every replica."""
    context = tf.distribute.InputContext(1, 0, replicas)
    config = _data_config(data, "validation", 32)
    batches = list(inputs.click_logs(config, _sizes(data), 13, context))
    assert len(batches) % replicas == 0
    assert all(len(labels) == 32 // replicas for _, labels in batches)
    lines = (data / "validation-00000-of-00001.tsv").read_text().splitlines()
    assert sum(float(tf.reduce_sum(f["weights"])) for f, _ in batches) == len(lines)
    clicks = sum(float(tf.reduce_sum(f["weights"] * labels)) for f, labels in batches)
    assert clicks == sum(line.startswith("1\t") for line in lines)


def test_empty_files_and_ids_that_are_too_large(tmp_path, data):
    (tmp_path / "train").touch()
    with pytest.raises(FlagValueError, match="files with rows"):
        inputs.click_logs(_data_config(tmp_path, "train", 4), [5], 1)
    too_small = [size - 1 for size in _sizes(data)]
    config = _data_config(data, "train", 5000)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"not below task.model.vocab_sizes"):
        next(iter(inputs.click_logs(config, too_small, 13)))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("0\t1\t-1\t0", "expected an id from 0 to 4 in field 3, received -1"),
        ("0\t1\t0\t7", "expected an id from 0 to 6 in field 4, received 7"),
        ("0\t1\t0", "expected 4 fields separated by TABs, received 3"),
        ("0\tone\t0\t0", "expected a number in field 2, received 'one'"),
    ],
)
def test_rows_that_can_not_be_read(tmp_path, row, said, monkeypatch):
    """An id of -1 too, which is the last row of the column before in one table of all."""
    monkeypatch.setattr(inputs, "_ROWS", 2)
    good = "1\t0.5\t4\t6\n"
    (tmp_path / "train-0").write_text(4 * good)
    (tmp_path / "train-1").write_text(3 * good + row + "\n" + good)
    config = _data_config(tmp_path, "train", 9)
    with pytest.raises(tf.errors.InvalidArgumentError):
        next(iter(inputs.click_logs(config, [5, 7], 1)))
    files = inputs.matching_files(config.input_path)
    assert inputs.first_bad_row(files, [5, 7], 1) == f"{tmp_path / 'train-1'}, line 4: {said}"
    assert inputs.first_bad_row(files[:1], [5, 7], 1) is None


# Three numbers of one category, two of up to three: a made-up file, prepared.
SEVERAL = "1\t0.5\t4\t3,0,6\t1\n0\t1\t0\t2\t1,1\n1\t0\t2\t\t0\n"


def test_several_ids_of_a_row(tmp_path):
    (tmp_path / "validation").write_text(SEVERAL)
    config = _data_config(tmp_path, "validation", 4)
    ((features, labels),) = inputs.click_logs(config, [5, 7, 2], 1, None, [1, 3, 2])
    np.testing.assert_array_equal(labels[:3], [1, 0, 1])
    np.testing.assert_array_equal(features["weights"], [1, 1, 1, 0])
    columns = [
        column[:3].numpy().tolist() for _, column in sorted(features["sparse_features"].items())
    ]
    padded = [[3, 0, 6], [2, -1, -1], [0, -1, -1]]
    assert columns == [[4, 0, 2], padded, [[1, -1], [1, 1], [0, -1]]]
    assert inputs.first_bad_row([str(tmp_path / "validation")], [5, 7, 2], 1, [1, 3, 2]) is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("0\t1\t0\t1,2,3,4\t0", "expected at most 3 ids in field 4, received 4"),
        ("0\t1\t0\t1,7\t0", "expected an id from 0 to 6 in field 4, received 7"),
        ("0\t1\t0\t1,-1\t0", "expected an id from 0 to 6 in field 4, received -1"),
        ("0\t1\t0\t1,\t0", "expected a number in field 4, received '1,'"),
        ("0\t1\t0,1\t1\t0", "expected a number in field 3, received '0,1'"),
    ],
)
def test_several_ids_that_can_not_be_read(tmp_path, row, said):
    """An id of -1 too, which stands for none within the model."""
    (tmp_path / "train").write_text(SEVERAL + row + "\n")
    columns = [5, 7, 2], 1, [1, 3, 2]
    lines = tf.constant((SEVERAL + row).splitlines())
    with pytest.raises(tf.errors.InvalidArgumentError):
        inputs.parsed_rows(lines, *columns)
    found = inputs.first_bad_row([str(tmp_path / "train")], *columns)
    assert found == f"{tmp_path / 'train'}, line 4: {said}"


@pytest.mark.parametrize("bad", [True, False])
def test_a_run_that_stops_at_a_row_names_it(tmp_path, data, monkeypatch, capsys, bad):
    for name in ("train", "validation"):
        (tmp_path / name).write_text(("0\t" * 39 + "0\n") * 3)
    (tmp_path / "dataset.json").write_text((data / "dataset.json").read_text())
    if bad:
        with (tmp_path / "validation").open("a") as file:
            file.write("0\t" * 39 + "-1\n")
    parts = [f"task.{s}_data.input_path={tmp_path}/{s}" for s in ("train", "validation")]
    params, options = _params(override=",".join(parts))

    def run(argv, *, check, **arguments):
        check(params, options)
        raise tf.errors.InvalidArgumentError(None, None, "some row")

    monkeypatch.setattr(train, "train_from_command_line", run)
    if not bad:
        with pytest.raises(tf.errors.InvalidArgumentError, match="some row"):
            train.main(["train"])
        return
    assert train.main(["train"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "task.validation_data.input_path: rows as prepare_data.py writes them" in error
    assert f"{tmp_path}/validation, line 4: expected an id from 0 to" in error


def test_a_part_of_one_row_is_refused(data):
    params, task = _task(sub_batches=4)
    params.task.train_data.override(
        {"input_path": f"{data}/train*", "global_batch_size": 4, "is_training": True}
    )
    with pytest.raises(FlagValueError, match="at least 2 rows in each of the 1 x 4 parts"):
        task.build_inputs(params.task.train_data)


# -- the task --------------------------------------------------------------------------------------


def _step(task, model, optimizer):
    @tf.function
    def step(batch):
        return task.train_step(batch, model, optimizer, metrics=[])

    return step


@pytest.mark.parametrize(
    ("kind", "embeddings"),
    [
        ("vr_sgd", None),
        pytest.param("sgd", None, marks=pytest.mark.long),
        pytest.param("vr_sgd", "adagrad", marks=pytest.mark.long),
        pytest.param("vr_momentum", "vr_sgd", marks=pytest.mark.long),
    ],
)
def test_no_gradient_of_a_tables_size(kind, embeddings):
    sizes = (TABLE_ROWS, 60, 70)
    params, task = _task(kind, embeddings, sub_batches=2, sizes=sizes)
    model = task.build_model()
    optimizer = train_utils.create_optimizer(task, params)
    (table,) = model.embedding_trainable_variables
    assert table.shape[0] == sum(sizes)

    batch = _batch(16, sizes)
    with tf.GradientTape() as tape:
        loss = task.build_losses(batch[1], model(batch[0]))
    gradient = tape.gradient(loss, table)
    assert isinstance(gradient, tf.IndexedSlices)
    assert gradient.values.shape == (3 * 16, 4)

    step = _step(task, model, optimizer)
    step(batch)  # makes the optimizer's variables
    found = table_sized_outputs(step.get_concrete_function(batch))
    assert found == []


@pytest.mark.parametrize(
    ("kind", "embeddings", "joint"),
    [("sgd", "adagrad", True), pytest.param("sgd", None, False, marks=pytest.mark.long)],
)
def test_parts_of_a_batch_are_like_the_whole(kind, embeddings, joint):
    """Sub-batches change nothing with optimizers that have no statistics of them."""
    weights = []
    for sub_batches in (1, 4):
        params, task = _task(kind, embeddings, sub_batches, joint_embeddings=joint)
        model = task.build_model()
        assert len(model.embedding_trainable_variables) == (1 if joint else 3)
        optimizer = train_utils.create_optimizer(task, params)
        step = _step(task, model, optimizer)
        for seed in range(3):
            step(_batch(16, seed=seed))
        weights.append([v.numpy() for v in model.trainable_variables])
        assert int(optimizer.iterations) == 3
    for whole, parts in zip(*weights, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("embeddings", [None, "vr_sgd", "sgd"])
def test_replicas_and_sub_batches_give_the_same_weights(embeddings):
    """2 replicas x 2 parts and 1 x 4: the same four gradients, so the same signal-to-noise."""
    weights = []
    batches = [_batch(16, seed=seed) for seed in range(3)]
    for replicas, sub_batches in ((1, 4), (2, 2)):
        strategy = strategy_of(replicas)
        with strategy.scope():
            params, task = _task("vr_sgd", embeddings, sub_batches)
            model = task.build_model()
            optimizer = train_utils.create_optimizer(task, params)
        initial = [v.numpy() for v in model.trainable_variables]

        @tf.function
        def step(batch, strategy=strategy, task=task, model=model, optimizer=optimizer, n=replicas):
            def local():
                index = tf.distribute.get_replica_context().replica_id_in_sync_group
                own = tf.nest.map_structure(
                    lambda t: t[index * (16 // n) : (index + 1) * (16 // n)], batch
                )
                own = tf.nest.map_structure(
                    lambda t: tf.ensure_shape(t, [16 // n, *t.shape[1:]]), own
                )
                return task.train_step(own, model, optimizer, metrics=[])[task.loss]

            return strategy.run(local)

        for batch in batches:
            step(batch)
        weights.append([v.numpy() for v in model.trainable_variables])
        assert any(np.any(a != b) for a, b in zip(initial, weights[-1], strict=True))
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


def test_embeddings_have_their_own_optimizer_and_rate():
    params, task = _task("sgd", "sgd")
    own = params.trainer.optimizer_config.embeddings
    own.override({"learning_rate": {"type": "constant", "constant": {"learning_rate": 0.9}}})
    model = task.build_model()
    optimizer = train_utils.create_optimizer(task, params)
    assert isinstance(optimizer, EmbeddingsApart)
    batch = _batch(16)
    with tf.GradientTape() as tape:
        loss = task.build_losses(batch[1], model(batch[0]))
    gradients = tape.gradient(loss, model.trainable_variables)
    before = [v.numpy() for v in model.trainable_variables]
    table = model.embedding_trainable_variables[0]
    _step(task, model, optimizer)(batch)
    for value, gradient, variable in zip(before, gradients, model.trainable_variables, strict=True):
        rate = 0.9 if variable is table else 0.3
        np.testing.assert_allclose(
            variable.numpy(), value - rate * tf.convert_to_tensor(gradient), rtol=1e-4, atol=1e-6
        )
    assert float(optimizer.learning_rate) == pytest.approx(0.3)


def test_embeddings_apart_refuse_what_does_not_work():
    params, task = _task("sgd", "sgd")
    params.runtime.mixed_precision_dtype = "float16"
    with pytest.raises(ValueError, match="mixed_bfloat16"):
        train_utils.create_optimizer(task, params)


def test_metrics_are_those_of_scikit_learn(data):
    """Of all rows, with two replicas' filled-up batches."""
    _, task = _task("sgd", sizes=_sizes(data), num_dense_features=13)
    model = task.build_model()
    for variable in model.trainable_variables:  # Scores that differ more from row to row.
        variable.assign(1.2 * variable)
    metrics = task.build_metrics(training=False)
    config = _data_config(data, "validation", 64)
    labels, scores = [], []
    for inputs_and_labels in inputs.click_logs(
        config, _sizes(data), 13, tf.distribute.InputContext(1, 0, 2)
    ):
        assert task.validation_step(inputs_and_labels, model, metrics) == {}
        features, clicks = inputs_and_labels
        there = features["weights"].numpy() > 0
        labels.append(clicks.numpy()[there])
        scores.append(tf.sigmoid(model(features)).numpy()[there])
    labels, scores = np.concatenate(labels), np.concatenate(scores)
    assert np.std(scores) > 0.02
    assert 0.001 < scores.min() < scores.max() < 0.999
    measured = {metric.name: float(metric.result()) for metric in metrics}
    assert measured["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=5e-4)
    assert measured["log_loss"] == pytest.approx(log_loss(labels, scores), rel=1e-4)
    assert measured["accuracy"] == pytest.approx(np.mean((scores > 0.5) == labels))


def test_exports_and_predictions(data, tmp_path):
    """A SavedModel and a file of predictions give what the model gives, of a single row too."""
    paths = [f"task.{name}_data.input_path={data}/{name}*" for name in ("train", "validation")]
    small = "task.model.embedding_dim=4,task.model.bottom_mlp=[8,4],task.model.top_mlp=[8,1]"
    override = ",".join([*paths, small, "task.validation_data.global_batch_size=64"])
    params, options = _params(override=override)
    train._check(params, options)
    task = task_factory.get_task(params.task)
    model = task.build_model()
    tf.train.Checkpoint(model=model).save(str(tmp_path / "model" / "ckpt"))
    command = ["train", f"--model_dir={tmp_path / 'model'}", f"--params_override={override}"]
    export_dir, written = tmp_path / "export", tmp_path / "predictions"
    assert train.main([*command, "--mode=export", f"--export_dir={export_dir}"]) == 0
    assert train.main([*command, "--mode=predict", f"--predictions={written}"]) == 0
    files = sorted(data.glob("validation*"))
    rows = [line for file in files for line in file.read_text().splitlines()]
    numbers = np.array([row.split("\t") for row in rows], np.float64)
    dense, ids = numbers[:, 1:14].astype(np.float32), numbers[:, 14:].astype(np.int32)
    sparse = {str(i): tf.constant(column) for i, column in enumerate(ids.T)}
    logits = model({"dense_features": tf.constant(dense), "sparse_features": sparse})
    expected = tf.sigmoid(logits).numpy()
    close = {"rtol": 1e-4, "atol": 1e-6}
    signatures = tf.saved_model.load(str(export_dir)).signatures
    for count in (1, 50):
        features = {"dense_features": dense[:count], "sparse_features": ids[:count]}
        found = signatures["serving_default"](**{k: tf.constant(v) for k, v in features.items()})
        np.testing.assert_allclose(found["probabilities"], expected[:count], **close)
        found = signatures["rows"](rows=tf.constant(rows[:count]))["probabilities"]
        np.testing.assert_allclose(found, expected[:count], **close)
    wrong = ids[:2].copy()
    wrong[0, 5] = -1
    with pytest.raises(tf.errors.InvalidArgumentError, match="ids in the data are negative"):
        signatures["serving_default"](
            dense_features=tf.constant(dense[:2]), sparse_features=tf.constant(wrong)
        )
    head, *lines = (line.split("\t") for line in written.read_text().splitlines())
    assert head == ["label", "probability"]
    np.testing.assert_array_equal([float(line[0]) for line in lines], numbers[:, 0])
    np.testing.assert_allclose([float(line[1]) for line in lines], expected, **close)


@pytest.mark.parametrize(("joint", "tables"), [(True, 2), (False, 3)])
def test_embeddings_of_several_ids_and_widths(joint, tables):
    """Means of the rows' own ids, whose gradient touches nothing else."""
    sizes, widths = [5, 7, 6], [4, 3, 4]
    layer = experiments.Embeddings(sizes, widths, joint)
    ids = {
        "0": tf.constant([4, 0]),
        "1": tf.constant([[3, 6, 3, -1], [2, -1, -1, -1]]),
        "2": tf.constant([[5, -1], [1, 4]]),
    }
    with tf.GradientTape() as tape:
        found = layer(ids)
        loss = tf.add_n([tf.reduce_sum(column) for column in found.values()])
    variables = layer.trainable_variables
    assert len(variables) == tables
    values = [variable.numpy() for variable in variables]
    if joint:  # columns 0 and 2 are one table
        first, second, third = values[0][:5], values[1], values[0][5:]
    else:
        first, second, third = values
    expected = {
        "0": first[[4, 0]],
        "1": np.stack([(2 * second[3] + second[6]) / 3, second[2]]),
        "2": np.stack([third[5], (third[1] + third[4]) / 2]),
    }
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-6)
    gradients = tape.gradient(loss, variables)
    touched = [{*gradient.indices.numpy().ravel().tolist()} for gradient in gradients]
    own = [{0, 4}, {2, 3, 6}, {1, 4, 5}]
    assert touched == ([{0, 4, 6, 9, 10}, own[1]] if joint else own)
    np.testing.assert_allclose(tf.convert_to_tensor(gradients[1])[3], [2 / 3] * 3, rtol=1e-6)


def _several(rows, seed=0):
    (features, labels), rng = _batch(rows, seed=seed), np.random.default_rng(seed)
    ids = rng.integers(0, 60, (rows, 3))
    ids[rng.random((rows, 3)) < 0.4] = -1
    ids[:, 0] = np.abs(ids[:, 0])
    features["sparse_features"]["1"] = tf.constant(ids, tf.int32)
    return features, labels


_SEVERAL = {
    "interaction": "multi_layer_dcn",
    "dcn_low_rank_dim": 3,
    "embedding_dim": [4, 2, 4],
    "multi_hot_sizes": [1, 3, 1],
    "bottom_mlp": [5],
}


def test_several_ids_and_widths_in_training(tmp_path):
    """In parts of a batch as in the whole, with an optimizer of the embeddings' own; exported."""
    weights = []
    for sub_batches in (1, 2):
        params, task = _task("sgd", "adagrad", sub_batches, **_SEVERAL)
        model = task.build_model()
        assert [v.shape for v in model.embedding_trainable_variables] == [(120, 4), (60, 2)]
        step = _step(task, model, train_utils.create_optimizer(task, params))
        losses = [float(step(_several(16))[task.loss]) for _ in range(20)]
        assert losses[-1] < losses[0] - 0.05
        weights.append([v.numpy() for v in model.trainable_variables])
    for whole, parts in zip(*weights, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-3, atol=1e-5)

    features, labels = _several(16)
    expected = tf.sigmoid(model(features))
    signatures = serving.export(params, model).signatures
    sparse = features["sparse_features"]
    ids = tf.concat([sparse["0"][:, None], sparse["1"], sparse["2"][:, None]], 1)
    found = signatures["serving_default"](
        dense_features=features["dense_features"], sparse_features=ids
    )
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-4)
    lines = [
        "\t".join(
            [
                *map(repr, dense),
                str(row[0]),
                ",".join(str(i) for i in row[1:4] if i >= 0),
                str(row[4]),
            ]
        )
        for dense, row in zip(features["dense_features"].numpy().tolist(), ids.numpy(), strict=True)
    ]
    rows = tf.constant([f"{label:g}\t{line}" for label, line in zip(labels, lines, strict=True)])
    found = signatures["rows"](rows=rows)
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="ids in the data are negative"):
        signatures["serving_default"](
            dense_features=features["dense_features"], sparse_features=tf.where(ids < 0, -2, ids)
        )


def test_the_cross_network():
    params, task = _task("sgd", interaction="cross")
    model = task.build_model()
    step = _step(task, model, train_utils.create_optimizer(task, params))
    losses = [float(step(_batch(16))[task.loss]) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.05
    features, _ = _batch(16)
    found = serving.export(params, model).signatures["serving_default"](
        dense_features=features["dense_features"],
        sparse_features=tf.stack([*features["sparse_features"].values()], 1),
    )
    np.testing.assert_allclose(found["probabilities"], tf.sigmoid(model(features)), rtol=1e-5)


# -- TPUStrategy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "embeddings", "sub_batches"),
    [("vr_sgd", None, 2), pytest.param("lbopt_lars", "vr_sgd", 1, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.long)])
def test_steps_trace_under_tpu_strategy(kind, embeddings, sub_batches, several):
    params, task = _task(kind, embeddings, sub_batches, **(_SEVERAL if several else {}))
    batch = _several(8) if several else _batch(8)
    nodes = graph_nodes(recipe_step(task, params, batch))
    assert sum(node.op == "CrossReplicaSum" for node in nodes) > 8
    assert not any(node.op.startswith("Unique") for node in nodes)
