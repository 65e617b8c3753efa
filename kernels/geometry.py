"""A convolution's sizes as the kernels see them: in as many dimensions as a kernel walks."""

from __future__ import annotations

from functools import lru_cache

from lnpu_torch.ops.pair_counts.conv_shape import ConvShape


@lru_cache(maxsize=512)
def in_dims(packed: tuple[int, ...], dims: int) -> ConvShape:
    """The geometry that `ConvShape.pack` lists, with `dims` dimensions: the first ones 1 where a convolution has fewer.

    Raises:
        ValueError: not such a list, or of more dimensions.
    """
    own, rest = divmod(len(packed) - 4, 6)
    if rest or not 0 <= own <= dims:
        raise ValueError(f"{len(packed)} numbers are not the packed geometry of 0 to {dims} dimensions")
    lists = [packed[4 + i * own : 4 + (i + 1) * own] for i in range(6)]
    fill = (1, 1, 1, 1, 0, 1)  # conv_input, conv_output, kernel, stride, padding, dilation
    return ConvShape(*packed[:4], *((value,) * (dims - own) + part for value, part in zip(fill, lists, strict=True)))
