"""Memory of operands that is used again: never one block for two, never more than was in use, none without layers."""

import copy
import gc

import pytest
import torch

import lnpu_torch as lnpu
from lnpu_torch.buffers import LARGE, LATELY, OPERANDS, Pool

MIB = 2**20


def empty(pool, size):
    return pool.empty((size,), torch.uint8)


def test_a_block_is_used_again_once_the_last_tensor_in_it_is_gone():
    pool = Pool()
    first = empty(pool, 4 * MIB)
    place, part = first.data_ptr(), first.view(4, -1)[1]
    del first
    other = empty(pool, 4 * MIB)
    assert other.data_ptr() != place and pool.kept() == 0
    del part
    assert pool.kept() == 4 * MIB
    assert empty(pool, 3 * MIB).data_ptr() == place


def test_tensors_in_use_share_nothing():
    pool = Pool()
    tensors: list[torch.Tensor] = []
    for i in range(200):
        if i % 3 == 2:
            del tensors[i % len(tensors)]
        tensors.append(pool.empty((1 + i % 5, LARGE // 4), torch.float32).fill_(i))
        assert all(int(t.min()) == int(t.max()) for t in tensors)
        assert len({int(t.flatten()[0]) for t in tensors}) == len(tensors)


def test_it_keeps_no_more_than_was_in_use_at_once():
    pool = Pool()
    pair = empty(pool, 2 * MIB), empty(pool, 3 * MIB)
    del pair
    assert pool.kept() == 5 * MIB
    large = empty(pool, 6 * MIB)
    assert pool.kept() == 0
    del large
    assert pool.kept() == 6 * MIB


def test_it_forgets_what_was_in_use_long_ago():
    pool = Pool()
    large = empty(pool, 8 * MIB)
    del large
    for kept in [8] * (LATELY - 1) + [1] * 3:
        small = empty(pool, MIB)
        del small
        assert pool.kept() == kept * MIB


def test_small_tensors_are_torchs_own():
    pool = Pool()
    small = empty(pool, LARGE - 1)
    del small
    assert pool.kept() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_gives_what_was_asked_for(dtype):
    x = Pool().empty((3, 5, 2**17), dtype)
    assert x.shape == (3, 5, 2**17) and x.dtype == dtype and x.is_contiguous()
    assert torch.equal(copy.deepcopy(x.fill_(2)), torch.full_like(x, 2))


class User:
    """Whoever needs a pool."""


def test_memory_is_given_back_with_the_last_user():
    pool, users = Pool(), [User(), User()]
    for user in users:
        pool.serve(user)
    kept, lent = empty(pool, 2 * MIB), empty(pool, 2 * MIB)
    del kept, user
    users.pop()
    assert pool.kept() == 2 * MIB
    users.pop()
    assert pool.kept() == 0
    lent.fill_(1)


def test_layers_are_users():
    gc.collect()
    before, x = OPERANDS.users, torch.randn(64, 64, 16, 16)
    layer = lnpu.nn.Conv2d(64, 8, 3)
    layer(x).sum().backward()
    assert OPERANDS.users == before + 1 and OPERANDS.kept() >= x.numel() * 4
    del layer
    gc.collect()
    assert OPERANDS.users == before
