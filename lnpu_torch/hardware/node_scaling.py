"""Energy of one process over that of another, by Stillmaker and Baas's fits to circuit simulations."""

from __future__ import annotations

import functools
import math

from lnpu_torch.files import CONFIGS, ConfigError, Frozen, read_yaml
from lnpu_torch.hardware.energy_tables import Polynomial
from lnpu_torch.hardware.sourced_value import Positive, SourcedValue


class NodeEnergy(Frozen):
    """Energy of a gate in one process against voltage, as coefficients of V^2, V and 1."""

    nm: Positive
    polynomial: Polynomial

    def at(self, voltage: float) -> float:
        a, b, c = self.polynomial
        return a * voltage**2 + b * voltage + c


class NodeTable(Frozen):
    """All processes, the largest first."""

    energy: SourcedValue[tuple[NodeEnergy, ...]]


@functools.cache
def node_table() -> NodeTable:
    """The table in configs/nodes.yaml."""
    return read_yaml(NodeTable, CONFIGS / "nodes.yaml")


def interpolated(nm: float) -> bool:
    """Whether a process lies between two of the table. Raises ConfigError outside of it."""
    known = [node.nm for node in node_table().energy.value]
    if not known[-1] <= nm <= known[0]:
        raise ConfigError(f"node: {nm:g} nm lies outside the table of processes, {known[0]:g} ... {known[-1]:g} nm")
    return nm not in known


def node_energy(nm: float, voltage: float) -> float:
    """Energy in a process at a voltage, in a unit that cancels in a ratio; between two of the table as a power of nm.

    Raises:
        ConfigError: the process lies outside the table.
    """
    interpolated(nm)
    nodes = node_table().energy.value
    place = next(i for i, node in enumerate(nodes) if node.nm <= nm)
    below, above = nodes[place], nodes[max(place - 1, 0)]
    share = math.log(nm / below.nm) / math.log(above.nm / below.nm) if nm > below.nm else 0.0
    return math.pow(below.at(voltage), 1 - share) * math.pow(above.at(voltage), share)


def node_scale(nm: float, voltage: float, to_nm: float, to_voltage: float) -> float:
    """Energy in the second process and at its voltage over that in the first. Raises ConfigError as `node_energy`."""
    return node_energy(to_nm, to_voltage) / node_energy(nm, voltage)
