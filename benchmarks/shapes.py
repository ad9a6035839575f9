"""The shapes of the trainable variables of known models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """ResNet-50 for 1000 classes: 53 convolutions, their batch normalizations, one dense layer."""
    shapes = _convolution(7, 3, 64)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _convolution(1, channels, width)
            shapes += _convolution(3, width, width)
            shapes += _convolution(1, width, 4 * width)
            if block == 0:
                shapes += _convolution(1, channels, 4 * width)
            channels = 4 * width
    return [*shapes, (channels, 1000), (1000,)]


def bert_base() -> list[Shape]:
    """BERT-base, uncased, with pooler and masked-language head (which shares the embedding)."""
    vocabulary, positions, types, layers = 30522, 512, 2, 12
    hidden, heads, inner = 768, 12, 3072
    head_size = hidden // heads
    normalization = [(hidden,), (hidden,)]
    query_key_value = [(hidden, heads, head_size), (heads, head_size)] * 3
    layer = [
        *query_key_value,
        (heads, head_size, hidden),
        (hidden,),
        *normalization,
        (hidden, inner),
        (inner,),
        (inner, hidden),
        (hidden,),
        *normalization,
    ]
    dense = [(hidden, hidden), (hidden,)]
    return [
        (vocabulary, hidden),
        (positions, hidden),
        (types, hidden),
        *normalization,
        *layer * layers,
        *dense,  # pooler
        *dense,  # masked-language head
        *normalization,
        (vocabulary,),
    ]


def tiny() -> list[Shape]:
    """Seven small variables; one is large enough for the one-pass norm. For tests."""
    return [(3, 3, 3, 8), (8,), (8,), (160, 128), (128,), (128, 10), (10,)]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": resnet50,
    "bert_base": bert_base,
    "tiny": tiny,
}


def count(shapes: Sequence[Shape]) -> int:
    """The number of parameters."""
    return sum(math.prod(shape) for shape in shapes)


def _convolution(size: int, inputs: int, outputs: int) -> list[Shape]:
    return [(size, size, inputs, outputs), (outputs,), (outputs,)]
