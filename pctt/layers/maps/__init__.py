"""Maps: the parts that a block's prediction is composed of, each with its local rules in backend operations.

A map takes one or more values, [B, *shape] each and stored flat, to one value. It has three rules:

    forward    y = map(x)
    push       what a change of one input adds to y, where the map is linear (up to a constant) in its inputs
    pull       v -> J' v, with J = dy/dx of one input
    gradient   v -> (dy/dW)' v for each of its weights

Blocks (`block.py`) compose them; only changes go through linear maps, as everywhere in pctt. Maps whose names
torch.nn has mean what they mean there, on samples without the batch axis.
"""

from pctt.layers.maps.attention import Attend
from pctt.layers.maps.base import Map, Options, Passing, Shape, Use, unchanged
from pctt.layers.maps.convolution import Conv2d, ConvTranspose2d
from pctt.layers.maps.linear import Embedding, Linear
from pctt.layers.maps.normalisation import Affine, Bias, Normalise, NormaliseBatch, Standardise
from pctt.layers.maps.pooling import AvgPool2d, MaxPool2d
from pctt.layers.maps.shaping import (
    Add,
    Concat,
    Fill,
    Flatten,
    Function,
    Multiply,
    Permute,
    Reshape,
    Scale,
    Shift,
    Slice,
)

__all__ = [
    "MAPS",
    "Add",
    "Affine",
    "Attend",
    "AvgPool2d",
    "Bias",
    "Concat",
    "Conv2d",
    "ConvTranspose2d",
    "Embedding",
    "Fill",
    "Flatten",
    "Function",
    "Linear",
    "Map",
    "MaxPool2d",
    "Multiply",
    "Normalise",
    "NormaliseBatch",
    "Options",
    "Passing",
    "Permute",
    "Reshape",
    "Scale",
    "Shape",
    "Shift",
    "Slice",
    "Standardise",
    "Use",
    "unchanged",
]

MAPS: dict[str, type[Map]] = {
    entry.kind: entry
    for entry in (
        Function,
        Scale,
        Shift,
        Reshape,
        Flatten,
        Permute,
        Fill,
        Slice,
        Add,
        Multiply,
        Concat,
        Linear,
        Conv2d,
        ConvTranspose2d,
        Embedding,
        MaxPool2d,
        AvgPool2d,
        Normalise,
        NormaliseBatch,
        Affine,
        Bias,
        Standardise,
        Attend,
    )
}
