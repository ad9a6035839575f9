"""What trained models of this recipe are used for: a SavedModel, predictions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from official.nlp.serving.serving_modules import QuestionAnswering
from official.nlp.tasks import question_answering

from official_recipes.common.files import json_text
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.tfm_export import Exported, Uses, batches

VOCABULARY = "vocab.txt"

_IDS = ("input_word_ids", "input_mask", "input_type_ids", "masked_lm_positions")


def export(params: Any, model: Any) -> Exported:
    """Ids to logits; for SQuAD questions and contexts as text too, by tensorflow_text."""
    if hasattr(params.task, "scale_loss"):
        return _pretraining(params, model)
    return _question_answering(params, model)


def _pretraining(params: Any, model: Any) -> Exported:
    names = ["mlm_logits", *(head.name for head in params.task.model.cls_heads)]

    # tf-models' own module leaves out the logits of the masked tokens.
    @tf.function
    def serve(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = model(inputs, training=False)
        return {name: tf.cast(outputs[name], tf.float32) for name in names}

    specs = {name: tf.TensorSpec([None, None], tf.int32, name) for name in _IDS}
    paths = params.task.train_data.input_path
    first = paths if isinstance(paths, str) else "".join(paths[:1])
    vocabulary = Path(first.split(",")[0].strip()).parent / VOCABULARY
    known = bool(first) and "://" not in first and vocabulary.is_file()
    return Exported(
        {"serving_default": serve.get_concrete_function(**specs)},
        files={VOCABULARY: vocabulary.read_bytes()} if known else {},
        note="the SavedModel takes ids: which tokens are masked is for its user to say",
    )


def _question_answering(params: Any, model: Any) -> Exported:
    data = params.task.validation_data
    module = QuestionAnswering(
        QuestionAnswering.Params(parse_sequence_length=data.seq_length), model
    )
    signatures = module.get_inference_signatures(
        {"serve": "serving_default", "serve_examples": "examples"}
    )
    if not data.vocab_file or not tf.io.gfile.exists(data.vocab_file):
        raise FlagValueError(
            "params_override",
            "task.validation_data.vocab_file: a file that exists",
            repr(data.vocab_file),
        )
    with tf.io.gfile.GFile(data.vocab_file, "rb") as file:
        files = {VOCABULARY: file.read()}
    if data.tokenization != "WordPiece":
        return Exported(signatures, files=files, note="the SavedModel takes ids, not text")
    try:
        import tensorflow_text
    except ImportError as error:
        note = f"the SavedModel takes ids, not text: {error}"
        return Exported(signatures, files=files, note=note)
    tokens = files[VOCABULARY].decode().splitlines()
    begin, end = (tokens.index(token) for token in ("[CLS]", "[SEP]"))
    tokenizer = tensorflow_text.BertTokenizer(
        data.vocab_file, lower_case=data.do_lower_case, token_out_type=tf.int32
    )

    @tf.function
    def text(question: tf.Tensor, context: tf.Tensor) -> dict[str, tf.Tensor]:
        asked = tokenizer.tokenize(question).merge_dims(1, -1)[:, : data.query_length]
        read = tokenizer.tokenize(context).merge_dims(1, -1)
        # As many as there is room for beside the longest question.
        room = data.seq_length - 3 - tf.cast(tf.reduce_max(asked.row_lengths()), tf.int32)
        ids, types = tensorflow_text.combine_segments([asked, read[:, :room]], begin, end)
        shape = [None, data.seq_length]
        ids, types = (part.to_tensor(0, shape=shape) for part in (ids, types))
        # The padding has the id 0, and no other token has.
        mask = tf.cast(ids != 0, tf.int32)
        return {"input_word_ids": ids, **module.serve(ids, mask, tf.cast(types, tf.int32))}

    signatures["text"] = text.get_concrete_function(
        *(tf.TensorSpec([None], tf.string, name) for name in ("question", "context"))
    )
    return Exported(signatures, [tokenizer], files)


def predict(params: Any, task: Any, model: Any) -> Iterator[str]:
    """A line of each masked token; for SQuAD the answers as JSON, by the questions' ids."""
    data = params.task.validation_data
    if not hasattr(params.task, "scale_loss"):
        answers, _, _ = question_answering.predict(task, data, model)
        yield json_text(answers)
        return
    yield "id\tprediction\tlog_probability\n"

    @tf.function(reduce_retracing=True)
    def measure(inputs: dict[str, Any]) -> tuple[tf.Tensor, ...]:
        logits = tf.cast(task.inference_step(inputs, model)["mlm_logits"], tf.float32)
        ids, there = inputs["masked_lm_ids"], inputs["masked_lm_weights"] > 0
        logs = tf.gather(tf.nn.log_softmax(logits), ids, batch_dims=2)
        best = tf.argmax(logits, axis=-1)
        return tuple(tf.boolean_mask(tensor, there) for tensor in (ids, best, logs))

    for inputs in batches(task, data):
        for token, best, log in zip(*(t.numpy() for t in measure(inputs)), strict=True):
            yield f"{token}\t{best}\t{log:.6g}\n"


USES = Uses(export, predict)
