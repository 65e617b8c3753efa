"""How other libraries round a float32 tensor to E4M3, for those that are installed. Nothing is measured here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

import torch
from copies import Cast
from torch import Tensor


def add_option(parser: argparse.ArgumentParser) -> None:
    what = "measure peers too, these or all that are installed: E4M3 throughout, no counts"
    parser.add_argument("--peers", nargs="*", choices=PEERS, help=what)


def installed(names: Sequence[str] | None) -> dict[str, Cast]:
    """The casts of these peers (none: of all) that can be imported; what cannot is said, and why, on standard error."""
    found: dict[str, Cast] = {}
    for name in () if names is None else names or PEERS:
        try:
            cast = PEERS[name]()
            cast(torch.randn(3, 5))
            found[name] = cast
        except Exception as reason:  # a peer may fail in any way, while it compiles itself, for instance
            print(f"# {name} is left out: {type(reason).__name__}: {str(reason)[:300]}", file=sys.stderr)
    return found


def _torch() -> Cast:
    return lambda x: x.to(torch.float8_e4m3fn).to(torch.float32)


def _ml_dtypes() -> Cast:
    form = import_module("ml_dtypes").float8_e4m3fn
    return lambda x: torch.from_numpy(x.detach().numpy().astype(form).astype("float32"))


def _qtorch() -> Cast:
    return partial(import_module("qtorch.quant").float_quantize, exp=4, man=3, rounding="nearest")


def _mptorch() -> Cast:
    return partial(import_module("mptorch.quant").float_quantize, exp=4, man=3, rounding="nearest")


def _microxcaling() -> Cast:
    elementwise = import_module("mx.elemwise_ops")._quantize_elemwise
    return partial(elementwise, elem_format="fp8_e4m3")


def _torchao() -> Cast:
    cast = import_module("torchao.float8.float8_utils").to_fp8_saturated

    def run(x: Tensor) -> Tensor:
        rounded: Tensor = cast(x, torch.float8_e4m3fn)
        return rounded.to(torch.float32)

    return run


def _brevitas() -> Cast:
    form = import_module("brevitas.quant.experimental.float_quant_ocp").Fp8e4m3OCPActPerTensorFloat
    layer = import_module("brevitas.nn").QuantIdentity(form).eval()

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            rounded: Tensor = layer(x)
        return rounded

    return run


PEERS: dict[str, Callable[[], Cast]] = {
    "torch casts": _torch,
    "ml_dtypes": _ml_dtypes,
    "qtorch": _qtorch,
    "mptorch": _mptorch,
    "microxcaling": _microxcaling,
    "torchao": _torchao,
    "brevitas": _brevitas,
}
