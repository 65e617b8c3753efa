"""Work split over threads: the same results on torch's own threads, on a pool's, and in a forked process."""

import os
import threading

import pytest
import torch

from lnpu_torch import threads
from lnpu_torch.cpu import round_half

LARGE = 4 * threads.SMALL


@pytest.fixture(params=["openmp", "pool"])
def several(request, monkeypatch):
    """Three threads, by one way or the other."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("this torch brings no libgomp")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(before)


def test_shares_come_in_order_and_run_on_threads_of_their_own(several):
    seen = set()
    meet = threading.Barrier(3, timeout=60)

    def run(start, stop):
        meet.wait()  # fails unless all three run at once
        seen.add(threading.get_native_id())
        return start, stop

    assert threads.split(run, 10, LARGE) == [(0, 3), (3, 6), (6, 10)]
    assert len(seen) == 3


@pytest.mark.parametrize("several", ["openmp"], indirect=True)
def test_the_interpreter_keeps_its_state_of_a_worker(several):
    local = threading.local()

    def run(start, stop):
        local.calls = getattr(local, "calls", 0) + 1
        return local.calls

    assert [threads.split(run, 3, LARGE) for _ in range(3)] == [[1] * 3, [2] * 3, [3] * 3]


def test_little_work_and_few_parts_stay_on_fewer_threads(several):
    here = []
    assert threads.split(lambda *share: here.append(threading.get_native_id()) or share, 5, 100) == [(0, 5)]
    assert here == [threading.get_native_id()]
    assert threads.split(lambda *share: share, 2, LARGE) == [(0, 1), (1, 2)]


def test_an_error_in_any_share_is_raised(several):
    def run(start, stop):
        if start == 6:
            raise ValueError(f"share from {start}")
        return start

    with pytest.raises(ValueError, match="share from 6"):
        threads.split(run, 10, LARGE)


def test_calls_from_several_threads_at_once(several):
    x, done = torch.randn(8, LARGE), []

    def work(row):
        round_half(x[row], x[row])
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
    threads.split(lambda *share: share, 10, LARGE)  # threads have been started here
    child = os.fork()
    if child == 0:
        os._exit(threads.split(lambda *share: share, 10, LARGE) != [(0, 3), (3, 6), (6, 10)])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
