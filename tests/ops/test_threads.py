"""Work shared among threads: the same results on torch's own threads, on a pool's, and in a forked process."""

import os
import threading

import numpy as np
import pytest
import torch

from lnpu_torch.ops import parallel
from lnpu_torch.ops.numba_jit import compiled
from lnpu_torch.ops.parallel import in_parallel
from lnpu_torch.ops.quantize.cpu import round_half

LARGE = 4 * parallel.SMALL


@pytest.fixture(params=["openmp", "pool"])
def several(request, monkeypatch):
    """Three threads, by one way or the other."""
    if request.param == "pool":
        monkeypatch.setattr(parallel, "_openmp", lambda: None)
    elif parallel._openmp() is None:
        pytest.skip("this torch brings no libgomp")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    parallel._address.cache_clear()
    yield request.param
    parallel._address.cache_clear()
    torch.set_num_threads(before)


@compiled
def _meet(share, shares, here, gate):
    """Wait until as many threads as there are shares are in here; gives up after a while, and says so by -1."""
    here[share] = 1
    for _ in range(gate):
        if here.sum() == shares:
            return
    here[share] = -1


@compiled
def _note(share, shares, seen, factor):
    seen[share] += factor * (share + shares)


@compiled
def _fail(share, shares, seen):
    seen[share] = 1
    if share == 1:
        raise MemoryError


@compiled
def meet(team, here, gate):
    in_parallel(team, len(here), _meet, (here, gate))


@compiled
def note(team, seen, factor):
    in_parallel(team, len(seen), _note, (seen, factor))


@compiled
def fail(team, seen):
    in_parallel(team, len(seen), _fail, (seen,))


def test_shares_run_at_once(several):
    here = np.zeros(3, np.int64)
    meet(parallel.team(LARGE), here, 2**30)
    assert here.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shares", [1, 2, 3, 100])
def test_each_share_runs_once(several, shares):
    seen = np.zeros(shares)
    note(parallel.team(LARGE), seen, 2.0)
    assert seen.tolist() == [2.0 * (share + shares) for share in range(shares)]


def test_little_work_stays_on_one_thread(several):
    assert parallel.team(LARGE)[1] == 3 and parallel.team(100)[1] == 1


def test_an_error_in_any_share_is_raised_when_all_have_run(several):
    seen = np.zeros(3)
    with pytest.raises(MemoryError):
        fail(parallel.team(LARGE), seen)
    assert seen.tolist() == [1, 1, 1]


def test_where_no_thread_can_be_started_one_does_it_all(monkeypatch, several):
    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(parallel, "_pool", refuse)
    seen = np.zeros(3)
    note(parallel.team(LARGE), seen, 1.0)
    assert seen.tolist() == [3.0, 4.0, 5.0]


def test_calls_from_several_threads_at_once(several):
    x, done = torch.randn(8, LARGE), []

    def work(row):
        round_half(x[row])
        done.append(row)

    expected = x.half().float()
    workers = [threading.Thread(target=work, args=(row,)) for row in range(len(x))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(done) == list(range(len(x))) and torch.equal(x, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_goes_on(several):
    note(parallel.team(LARGE), np.zeros(3), 1.0)  # threads have been started here
    child = os.fork()
    if child == 0:
        seen = np.zeros(3)
        note(parallel.team(LARGE), seen, 1.0)
        os._exit(seen.tolist() != [3.0, 4.0, 5.0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
