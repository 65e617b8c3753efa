"""The commands that show chips: chips, normalize. They read arguments and print."""

from __future__ import annotations

from os.path import expanduser
from typing import Annotated

import typer

from lnpu_torch.cli.errors import Console
from lnpu_torch.cost.normalization import normalized
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.hardware.chip import chips as all_chips
from lnpu_torch.reporting.chip_tables import checks_tables, chips_table, normalized_blocks
from lnpu_torch.text_tables import plain


def chips(
    name: Annotated[str | None, typer.Argument(parser=expanduser, help="A built-in chip or a YAML file.")] = None,
) -> None:
    """List the built-in chips; or one chip's values, each with its tag and source, and its published figures."""
    if name is None:
        print(plain(chips_table(all_chips())))
    else:
        shown = read_chip(name)
        Console().print(shown, *checks_tables(shown))


def normalize(
    node: Annotated[float, typer.Option(metavar="NM", help="The process to compare in, such as 65.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CHIPS]...", parser=expanduser, help="Chips; else the built-in ones.")
    ] = None,
    voltage: Annotated[float | None, typer.Option(help="The voltage to compare at; else each one's own.")] = None,
) -> None:
    """Compare chips' published efficiencies in one process, by the energies of processes of Stillmaker and Baas.

    A process between two of the table is interpolated; one outside of it is an error.
    """
    shown = [read_chip(name) for name in names] if names else all_chips()
    print(plain(*normalized_blocks(normalized(shown, node, voltage), shown, node, voltage)))
