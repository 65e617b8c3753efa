"""How large the tensors are that the GPU's benchmarks work on: as in training, or tiny, to rehearse them. No code."""

from __future__ import annotations

from typing import NamedTuple

from place import Place

from lnpu_torch.ops.pair_counts.conv_shape import ConvShape

Shape = tuple[int, ...]


class Sizes(NamedTuple):
    pattern_step: int
    """Every how many-th bit pattern of float32 is rounded."""
    flat: int
    """Elements of a tensor without a grid."""
    grids: tuple[Shape, ...]
    odd_grids: tuple[Shape, ...]
    geometries: dict[str, ConvShape]
    products: tuple[tuple[int, int, int], ...]
    """m, n, k of the matrix products that are checked."""
    square: int
    """Edge of the matrices whose product is timed."""
    linears: tuple[tuple[int, int, int], ...]
    """Rows, inputs and outputs of the linear layers whose product is timed."""
    layer_batch: int
    layer_channels: int
    layer_edge: int
    models: dict[str, Model]


class Model(NamedTuple):
    """A model, and a batch of images for it."""

    name: str
    batch: int
    edge: int
    classes: int
    width: int | None = None


def sizes(place: Place) -> Sizes:
    return TINY if place.rehearses else REAL


REAL = Sizes(
    pattern_step=61,
    flat=2**26,
    grids=((256, 64, 56, 56), (512, 64, 32, 32), (512, 512, 4, 4)),
    odd_grids=((8192, 1000), (63, 500, 7, 9)),
    geometries={
        "3x3 56x56": ConvShape(256, 64, 64, 1, (56, 56), (56, 56), (3, 3), (1, 1), (1, 1), (1, 1)),
        "3x3 stride 2": ConvShape(256, 64, 128, 1, (56, 56), (28, 28), (3, 3), (2, 2), (1, 1), (1, 1)),
        "7x7 stride 2": ConvShape(128, 3, 64, 1, (224, 224), (112, 112), (7, 7), (2, 2), (3, 3), (1, 1)),
        "groups 4": ConvShape(128, 64, 64, 4, (28, 28), (28, 28), (3, 3), (1, 1), (1, 1), (1, 1)),
        "3x3 4x4": ConvShape(512, 512, 512, 1, (4, 4), (4, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
        "linear": ConvShape(4096, 1024, 1000, 1, (), (), (), (), (), ()),
    },
    products=((4096, 4096, 1024), (1000, 500, 630)),
    square=4096,
    linears=((12608, 768, 768), (12608, 768, 2304), (12608, 3072, 768), (2048, 512, 512)),
    layer_batch=8,
    layer_channels=64,
    layer_edge=32,
    models={
        "resnet18_cifar": Model("resnet18_cifar", 512, 32, 10),
        "vgg16_cifar": Model("vgg16_cifar", 512, 32, 10),
        "alexnet_cifar": Model("alexnet_cifar", 512, 32, 10),
        "resnet18": Model("resnet18", 256, 224, 1000),
    },
)
TINY = Sizes(
    pattern_step=2**24 + 1,
    flat=5000,
    grids=((2, 5, 4, 4),),
    odd_grids=((9, 7),),
    geometries={
        "3x3": ConvShape(2, 4, 6, 2, (5, 4), (5, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
        "linear": ConvShape(5, 9, 7, 1, (), (), (), (), (), ()),
    },
    products=((20, 18, 70),),
    square=128,
    linears=((20, 24, 12),),
    layer_batch=2,
    layer_channels=2,
    layer_edge=4,
    models={"resnet18_cifar": Model("resnet18_cifar", 2, 8, 3, width=1)},
)
