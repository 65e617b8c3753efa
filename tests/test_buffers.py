"""Memory of operands that is used again: never one place for two, never more than was needed, none without layers."""

import copy
import gc

import pytest
import torch

import lnpu_torch as lnpu
from lnpu_torch.buffers import LARGE, LATELY, OPERANDS, Pool

MIB = 2**20


def empty(pool, size):
    return pool.empty((size,), torch.uint8)


@pytest.fixture
def pool():
    """One that holds 8 MiB, as much was needed once."""
    pool = Pool()
    large = empty(pool, 8 * MIB)
    del large
    assert pool.kept() == 8 * MIB
    return pool


def test_a_place_is_used_again_once_the_last_tensor_in_it_is_gone(pool):
    first = empty(pool, 4 * MIB)
    place, part = first.data_ptr(), first.view(4, -1)[1]
    del first
    other = empty(pool, 4 * MIB)
    assert other.data_ptr() == place + 4 * MIB and pool.kept() == 0
    del part
    assert pool.kept() == 4 * MIB
    assert empty(pool, 3 * MIB).data_ptr() == place


def test_tensors_in_use_share_nothing():
    pool = Pool()
    for _ in range(3):
        tensors: list[torch.Tensor] = []
        for i in range(200):
            if i % 3 == 2:
                del tensors[i % len(tensors)]
            tensors.append(pool.empty((1 + i % 5, LARGE // 4), torch.float32).fill_(i))
            assert all(int(t.min()) == int(t.max()) for t in tensors)
            assert len({int(t.flatten()[0]) for t in tensors}) == len(tensors)


def test_it_holds_what_was_needed_at_once():
    pool = Pool()
    pair = empty(pool, 2 * MIB), empty(pool, 3 * MIB)
    assert pool.kept() == 0  # each in memory of its own: nobody knew how much it would be
    del pair
    assert pool.kept() == 5 * MIB
    pair = empty(pool, 3 * MIB), empty(pool, 2 * MIB)
    assert pool.kept() == 0 and pair[1].data_ptr() == pair[0].data_ptr() + 3 * MIB
    beyond = empty(pool, 6 * MIB)
    del pair
    assert pool.kept() == 5 * MIB  # it is not moved while anything lies in it, or beyond
    del beyond
    assert pool.kept() == 11 * MIB


def test_it_forgets_what_was_needed_long_ago(pool):
    for i in range(2 * LATELY):
        small = empty(pool, MIB)
        del small
        assert pool.kept() == (8 if i < 2 * LATELY - 2 else 1) * MIB


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
    del kept, lent
    lent = empty(pool, 3 * MIB)
    del user
    users.pop()
    assert pool.kept() == MIB
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
