"""The commands that show chips: chips, normalize. They read arguments and print."""

from __future__ import annotations

import json
from os.path import expanduser
from typing import Annotated, Any

import typer
from rich.text import Text

from lnpu_torch.cli.errors import show
from lnpu_torch.cli.price import chip_names
from lnpu_torch.cost.chip_checks import run_checks
from lnpu_torch.cost.normalization import normalized
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.hardware.chip import chips as all_chips
from lnpu_torch.reporting.chip_tables import CHIPS_NOTE, checks_tables, chips_table, normalized_blocks
from lnpu_torch.text_tables import Blocks

Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


def chips(
    name: Annotated[
        str | None,
        typer.Argument(parser=expanduser, autocompletion=chip_names, help="A built-in chip or a YAML file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the built-in chips; or one chip's values, each with its tag and source, and its published figures."""
    shown = all_chips() if name is None else [read_chip(name)]
    if as_json:
        data = [chip_data(each) for each in shown]
        print(json.dumps(data if name is None else data[0], indent=1))
    elif name is None:
        show(Blocks(chips_table(shown), Text(CHIPS_NOTE)))
    else:
        show(shown[0])
        show(Blocks(*checks_tables(shown[0])))


def chip_data(chip: Chip) -> dict[str, Any]:
    """A chip as plain data: every value with its tag and source, and its published figures beside ours."""
    values = {key: entry.model_dump(mode="json") for key, entry in chip.values().items()}
    checks = {each.name: {**each.check.model_dump(mode="json"), "ours": each.ours} for each in run_checks(chip)}
    return {"name": chip.name, "description": chip.description, "values": values, "checks": checks}


def normalize(
    node: Annotated[float, typer.Option(metavar="NM", help="The process to compare in, such as 65.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CHIPS]...", parser=expanduser, help="Chips; else the built-in ones.")
    ] = None,
    voltage: Annotated[float | None, typer.Option(help="The voltage to compare at; else each one's own.")] = None,
    as_json: Json = False,
) -> None:
    """Compare chips' published efficiencies in one process, by the energies of processes of Stillmaker and Baas.

    A process between two of the table is interpolated; one outside of it is an error.
    """
    shown = [read_chip(name) for name in names] if names else all_chips()
    rows = normalized(shown, node, voltage)
    if as_json:
        checks = [(row, row.check.model_dump(mode="json")) for row in rows]
        print(json.dumps([{**row._asdict(), "chip": row.chip.name, "check": check} for row, check in checks], indent=1))
    else:
        show(Blocks(*normalized_blocks(rows, shown, node, voltage)))
