"""Tensors that try what rounding does, and how results are compared."""

import numpy as np
import torch


def all_patterns(dtype):
    """Every value of a 16-bit dtype, as float32."""
    return torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype).float()


def random_patterns(count, seed):
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return torch.from_numpy(bits.view(np.float32))


def identical(a, b):
    """Equal bit by bit; NaNs count as equal whatever their payload."""
    nan = a.isnan() & b.isnan()
    return torch.equal(a.view(torch.int32)[~nan], b.view(torch.int32)[~nan]) and torch.equal(a.isnan(), b.isnan())


def same_signs_too(a, b):
    """As `identical`, of any dtypes, and with the signs of NaN."""
    return identical(a.float(), b.float()) and torch.equal(a.signbit(), b.signbit())


def scalar(value):
    return torch.tensor(value, dtype=torch.int32)


def of_error_3_in_128():
    """Numbers of [1, 2) whose squared error in E4M3 is predicted to be (3 / 128)^2 of their squares, exactly."""
    counts = torch.tensor([1, 25, 22, 6])
    assert (counts * torch.tensor([61, 91, 127, 169])).sum() * 9 == 1024 * counts.sum()
    return (1 + torch.arange(4) / 4).repeat_interleave(counts)


def spread(*shape, seed=0):
    """Numbers of all magnitudes, with zeros and everything special."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-45, 20, shape, generator=generator)
    special = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, -1e-40, 3e38, -3e38, 65519.0, 65520.0]
    flat = x.view(-1)
    flat[: len(special)] = torch.tensor(special)[: len(flat)]
    return x


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "a part": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "rows and columns swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}
