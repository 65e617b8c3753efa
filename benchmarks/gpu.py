"""Everything that a GPU is needed for, in sections, each in a process of its own: what one breaks, the others survive.

First, side by side, what builds the kernels and holds them against their references; then, one after another, what is
timed; then which goals that meets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import NamedTuple

import checks
import gpu_steps
from place import Place
from rows import Row, origin, write
from sizes import sizes

import kernels

Section = Callable[[Place], Iterator[Row]]
Run = Callable[[str, float], list[Row]]
LIMIT_S = 470.0
"""For all of it; what has not begun by then is left out, and a row says so."""
CHECKS_S = 180.0
"""The longest that the checks may take together."""
BUILDERS = 4
"""Processes that share in building one model's kernels."""
CIFAR = ("resnet18_cifar", "vgg16_cifar", "alexnet_cifar")


class Goal(NamedTuple):
    row: str
    """How the names of the rows begin that it is about."""
    figure: str
    bound: float
    at_least: bool = False


GOALS = (
    *(Goal(f"step {name} ", "ratio_to_autocast", 1.25) for name in CIFAR),
    *(Goal(f"step {name} ", "ratio_to_float32", 0.6) for name in CIFAR),
    *(Goal(f"step {name} ", "peak_memory_ratio", 1.0) for name in CIFAR),
    Goal("quantize values, totals float32", "bandwidth_share", 0.85, at_least=True),
    Goal("operand ", "bandwidth_share", 0.85, at_least=True),
    Goal("matmul 4096^3 chunk 64", "ratio_to_torch", 3.0),
    Goal("compiled step ", "ratio_to_compiled", 1.15),
    Goal("step resnet18 ", "ratio_to_float32", 1.0),
)


def verdicts(check: Callable[[Place], checks.Verdicts], place: Place) -> Iterator[Row]:
    for name, equal in check(place):
        yield {"name": name, "equal": equal}
        place.free()


def side_by_side(place: Place) -> dict[str, Section]:
    """Sections that are not timed."""
    models = sizes(place).models
    found: dict[str, Section] = {f"check {name}": partial(verdicts, check) for name, check in kernels.CHECKS.items()}
    for name in models:
        for part in range(BUILDERS):
            found[f"build {name} {part}"] = partial(gpu_steps.build_kernels, name=name, part=part, parts=BUILDERS)
    return found


def in_turn(place: Place) -> dict[str, Section]:
    """Sections that are timed, what matters most first."""
    models = list(sizes(place).models)
    times = {f"time {name}": section for name, section in kernels.TIMES.items()}
    steps: dict[str, Section] = {f"step {name}": partial(gpu_steps.eager, name=name) for name in models}
    first, *others = steps
    return {
        first: steps[first],
        "time quantize": times.pop("time quantize"),
        "time matmul": times.pop("time matmul"),
        f"graph {models[0]}": partial(gpu_steps.graphs, name=models[0]),
        **{name: steps[name] for name in others},
        f"compiled {models[0]}": partial(gpu_steps.compiled, name=models[0]),
        **times,
    }


def main(options: argparse.Namespace) -> int:
    """Runs the one section that is asked for here, or all of them, each in a process. The exit status: 0, all well."""
    place = Place("cpu" if options.rehearse else "cuda")
    if missing := place.missing():
        print(missing, file=sys.stderr)
        return 2
    if options.section:
        return one(options.section, place)
    well, run = True, partial(in_a_process, rehearse=options.rehearse)
    for row in every(side_by_side(place), in_turn(place), run):
        well &= "error" not in row and row.get("equal", True)
        write(row | {"device": place.name, **origin()}, options)
    return 0 if well else 1


def one(section: str, place: Place) -> int:
    place.prepare()
    for row in (side_by_side(place) | in_turn(place))[section](place):
        print(json.dumps(row), flush=True)
    return 0


def every(together: Iterable[str], alone: Iterable[str], run: Run, limit_s: float = LIMIT_S) -> Iterator[Row]:
    """The rows of all sections, as they come; at the end what took how long, and which goals are met."""
    started, rows = time.perf_counter(), []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        ends = started + min(CHECKS_S, limit_s)
        tasks = [pool.submit(attempt, name, run, ends) for name in together]
        for task in as_completed(tasks):
            yield from task.result()
    yield {"name": "built and checked", "seconds": round(time.perf_counter() - started, 1)}
    for name in alone:
        found = attempt(name, run, started + limit_s)
        rows += found
        yield from found
    yield {"name": "all sections", "seconds": round(time.perf_counter() - started, 1)}
    yield from judged(rows)


def attempt(section: str, run: Run, ends: float) -> list[Row]:
    """A section's rows, the last of which is its error if it failed."""
    left = ends - time.perf_counter()
    if left < 1:
        return [{"name": section, "error": "left out: no time was left"}]
    try:
        return run(section, left)
    except Exception as error:  # whatever it is, the other sections are not to suffer
        return [{"name": section, "error": f"{type(error).__name__}: {error}"}]


def in_a_process(section: str, limit_s: float, rehearse: bool) -> list[Row]:
    """What a section prints, and its error if it fails or takes too long."""
    command = [sys.executable, __file__.replace("gpu.py", "step.py"), "--device", "cuda", "--section", section]
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if rehearse else {**os.environ}
    process = subprocess.Popen(
        command + ["--rehearse"] * rehearse,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        output, errors = process.communicate(timeout=limit_s)
        failure = f"exit status {process.returncode}: {errors[-1500:]}" if process.returncode else None
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        failure = f"stopped after {limit_s:.0f} s"
    rows: list[Row] = [json.loads(line) for line in output.splitlines() if line.startswith('{"name"')]
    return rows + ([{"name": section, "error": failure}] if failure else [])


def judged(rows: list[Row]) -> Iterator[Row]:
    """For each goal the worst of the rows that it is about, and whether that meets it."""
    for goal in GOALS:
        found = [row[goal.figure] for row in rows if row["name"].startswith(goal.row) and goal.figure in row]
        worst = (min if goal.at_least else max)(found, default=None)
        met = worst is not None and (worst >= goal.bound if goal.at_least else worst <= goal.bound)
        sign = ">=" if goal.at_least else "<="
        yield {"name": f"goal {goal.row.strip()}: {goal.figure} {sign} {goal.bound}", "worst": worst, "met": met}
