"""Where the GPU's benchmarks run: on a GPU, or, as a rehearsal, on a CPU in Triton's interpreter. It knows no work."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from rows import Operation, Row, wall_seconds

from lnpu_torch.ops import dispatch


class Place(NamedTuple):
    """A device, and how time and memory are measured on it."""

    device: str = "cuda"

    @property
    def rehearses(self) -> bool:
        """Whether this is no GPU, so that everything is tiny and no figure means anything."""
        return self.device != "cuda"

    @property
    def name(self) -> str:
        return f"rehearsal on {platform.machine()}" if self.rehearses else torch.cuda.get_device_name()

    def missing(self) -> str | None:
        """Why nothing can be run here."""
        if self.rehearses or torch.cuda.is_available():
            return None
        return "torch sees no CUDA GPU: nothing was measured"

    def prepare(self) -> None:
        """Settings of the whole process: sums in float32 as the kernels have them, no TF32, cuDNN's fastest."""
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True

    def kernels(self) -> AbstractContextManager[None]:
        """Within this, layers use Triton's kernels, here as on a GPU."""
        return dispatch.backend("triton" if self.rehearses else "auto")

    def synchronize(self) -> None:
        if not self.rehearses:
            torch.cuda.synchronize()

    def finished(self, operation: Operation) -> Callable[[], None]:
        """The operation, and the wait until the device is done with it."""

        def run() -> None:
            operation()
            self.synchronize()

        return run

    def seconds(self, operation: Operation, times: int) -> float:
        """Of one of so many calls in a row, on the device's own clock."""
        if self.rehearses:
            return wall_seconds(operation)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            operation()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / times / 1e3

    def peak(self, step: Operation) -> int:
        """The most bytes allocated while a step runs, on top of what was there before, as other models' weights."""
        if self.rehearses:
            step()
            return 2**20
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def host_seconds(self, step: Operation) -> float:
        """Until a step returns, with nothing queued before it: what the host alone takes. The median of seven."""
        times = []
        for _ in range(7):
            self.synchronize()
            times.append(wall_seconds(step))
        self.synchronize()
        return statistics.median(times)

    def replayed(self, step: Operation) -> Operation:
        """A step as a CUDA graph: three times on another stream first, as torch asks for, then captured."""
        if self.rehearses:
            return step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def kernels_of(self, step: Operation, count: int = 5) -> Row:
        """Kernels of a step, for how long the device is busy with them, and those that take the longest."""
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CPU if self.rehearses else activity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            step()
            self.synchronize()
        key = "self_cpu_time_total" if self.rehearses else "self_device_time_total"
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
        events = [event for event in events if getattr(event, key) > 0]
        return {
            "kernels": sum(event.count for event in events),
            "busy_ms": round(sum(getattr(event, key) for event in events) / 1e3, 3),
            "slowest_kernels_us": {event.key[:70]: round(getattr(event, key)) for event in events[:count]},
        }

    def free(self) -> None:
        """Give back memory that nothing uses any more."""
        if not self.rehearses:
            torch.cuda.empty_cache()
