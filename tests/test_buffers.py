"""Memory of operands that is used again: never one place for two, never more than was needed, none without layers."""

import copy
import gc

import pytest
import torch

import lnpu_torch as lnpu
from lnpu_torch.ops import buffers
from lnpu_torch.ops.buffers import LARGE, LATELY, POOL, Pool


def empty(pool, size):
    return pool.empty((size,), torch.uint8)


class User:
    """Whoever needs a pool."""


USER = User()


def used():
    """A pool that somebody needs."""
    pool = Pool()
    pool.serve(USER)
    return pool


@pytest.fixture
def pool():
    """One that holds 8 parts, as much was needed once."""
    pool = used()
    large = empty(pool, 8 * LARGE)
    del large
    assert pool.kept() == 8 * LARGE
    return pool


def test_a_place_is_used_again_once_the_last_tensor_in_it_is_gone(pool):
    first = empty(pool, 4 * LARGE)
    place, part = first.data_ptr(), first.view(4, -1)[1]
    del first
    other = empty(pool, 4 * LARGE)
    assert other.data_ptr() == place + 4 * LARGE and pool.kept() == 0
    del part
    assert pool.kept() == 4 * LARGE
    assert empty(pool, 3 * LARGE).data_ptr() == place


def test_tensors_in_use_share_nothing(monkeypatch):
    monkeypatch.setattr(buffers, "LARGE", 2**20)
    pool = used()
    for _ in range(3):
        tensors: list[torch.Tensor] = []
        for i in range(200):
            if i % 3 == 2:
                del tensors[i % len(tensors)]
            tensors.append(pool.empty((1 + i % 5, 2**18), torch.float32).fill_(i))
            assert all(int(t.min()) == int(t.max()) for t in tensors)
            assert len({int(t.flatten()[0]) for t in tensors}) == len(tensors)


def test_it_holds_what_was_needed_at_once():
    pool = used()
    pair = empty(pool, 2 * LARGE), empty(pool, 3 * LARGE)
    assert pool.kept() == 0  # each in memory of its own: nobody knew how much it would be
    del pair
    assert pool.kept() == 5 * LARGE
    pair = empty(pool, 3 * LARGE), empty(pool, 2 * LARGE)
    assert pool.kept() == 0 and pair[1].data_ptr() == pair[0].data_ptr() + 3 * LARGE
    beyond = empty(pool, 6 * LARGE)
    del pair
    assert pool.kept() == 5 * LARGE  # it is not moved while anything lies in it, or beyond
    del beyond
    assert pool.kept() == 11 * LARGE


def test_it_forgets_what_was_needed_long_ago(pool):
    for i in range(2 * LATELY):
        small = empty(pool, LARGE)
        del small
        assert pool.kept() == (8 if i < 2 * LATELY - 2 else 1) * LARGE


def test_small_tensors_are_torchs_own():
    pool = used()
    small = empty(pool, LARGE - 1)
    del small
    assert pool.kept() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_it_gives_what_was_asked_for(dtype, last):
    x, form = used().empty((3, 5, 2**9, 2**9), dtype, last), torch.channels_last if last else torch.contiguous_format
    assert x.shape == (3, 5, 2**9, 2**9) and x.dtype == dtype and x.is_contiguous(memory_format=form)
    assert torch.equal(copy.deepcopy(x.fill_(2)), torch.full_like(x, 2)) and not x._is_view()


def test_without_users_tensors_are_torchs_own():
    pool = Pool()
    large = empty(pool, LARGE)
    assert large.untyped_storage().resizable()
    del large
    assert pool.kept() == 0


def test_memory_is_given_back_with_the_last_user():
    pool, users = Pool(), [User(), User()]
    for user in users:
        pool.serve(user)
    kept, lent = empty(pool, 2 * LARGE), empty(pool, 2 * LARGE)
    del kept, lent
    lent = empty(pool, 3 * LARGE)
    del user
    users.pop()
    assert pool.kept() == LARGE
    users.pop()
    assert pool.kept() == 0
    lent.fill_(1)


def test_layers_are_users():
    gc.collect()
    before, x = POOL.users, torch.randn(64, 64, 16, 16)
    layer = lnpu.nn.Conv2d(64, 8, 3)
    layer(x).sum().backward()
    assert POOL.users == before + 1 and POOL.kept() >= x.numel() * 4
    del layer
    gc.collect()
    assert POOL.users == before


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_layers_return_stays_as_long_as_somebody_holds_it(memory_format):
    layer, x = lnpu.nn.Conv2d(64, 64, 3, padding=1), torch.randn(64, 64, 16, 16).to(memory_format=memory_format)
    x.requires_grad_()
    for _ in range(2):
        results = [layer(x + i) for i in range(3)]
    copies = [result.clone() for result in results]
    assert not any(result.untyped_storage().resizable() for result in results)  # in the block
    for result in results[:2]:
        result.relu_().sum().backward()
        layer(x.detach() + 1).sum().backward()
    assert torch.equal(results[2], copies[2]) and torch.equal(results[0], copies[0].relu())
    assert all(result.is_contiguous(memory_format=memory_format) for result in results)


def test_gradients_of_weights_are_torchs_own():
    layer, x = lnpu.nn.Linear(1024, 1024), torch.randn(8, 1024)
    for _ in range(2):
        layer(x).sum().backward()
    assert layer.weight.grad.nbytes >= LARGE and layer.weight.grad.untyped_storage().resizable()
