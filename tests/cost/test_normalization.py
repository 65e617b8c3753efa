"""Published efficiencies brought to one process and voltage, by hand; and what cannot be."""

from __future__ import annotations

import pytest

from helpers.command import lnpu_command, refused
from lnpu_torch.cost.normalization import between, normalized
from lnpu_torch.files import ConfigError
from lnpu_torch.hardware.chip import chip, chips


def energy(polynomial: tuple[float, float, float], voltage: float) -> float:
    a, b, c = polynomial
    return a * voltage**2 + b * voltage + c


NM65, NM20, NM32 = (3.755, -4.398, 1.975), (0.2632, -0.14, 0.06841), (0.9559, -0.7823, 0.471)


def test_ibm_at_65_nm_by_hand() -> None:
    rows = {row.name: row for row in normalized([chip("ibm-14nm-2020")], 65)}
    assert set(rows) == {"efficiency"}  # throughput is none
    scale = energy(NM65, 0.54) / energy((0.1556, -0.06472, 0.03066), 0.54)
    assert rows["efficiency"].result == pytest.approx(1.4 / scale)
    assert rows["efficiency"].assumed == ()
    (lower,) = normalized([chip("ibm-14nm-2020")], 65, 0.78)
    assert lower.result == pytest.approx(1.4 / scale * energy(NM65, 0.54) / energy(NM65, 0.78))


def test_a_chip_in_its_own_process_stays_as_it_is() -> None:
    for row in normalized([chip("lnpu"), chip("tsunami")], 65):
        assert row.result == row.check.value
        assert row.assumed == (("nm", "V") if row.chip.name == "lnpu" else ("nm",))


def test_a_process_between_two_is_interpolated_and_named() -> None:
    rows = normalized([chip("redmule")], 65)
    share = 0.202786  # ln(22 / 20) / ln(32 / 20)
    between_both = energy(NM20, 0.65) ** (1 - share) * energy(NM32, 0.65) ** share
    assert rows[0].result == pytest.approx(0.755 * between_both / energy(NM65, 0.65), rel=1e-5)
    assert between(rows, 65) == [22]
    assert between(normalized([chip("lnpu")], 28), 28) == [28]


def test_a_chip_outside_the_table_has_no_result_and_says_so() -> None:
    rows = normalized([chip("h100")], 65)
    assert [row.result for row in rows] == [None, None]
    assert all("4 nm lies outside the table" in row.lacks for row in rows)
    assert between(rows, 65) == []
    bare = chip("lnpu").model_copy(update={"node_nm": None})
    assert {(row.result, row.lacks) for row in normalized([bare], 65)} == {(None, "its file has no node_nm")}


@pytest.mark.parametrize(
    ("nm", "voltage", "said"), [(3, None, "3 nm lies"), (65, 5.0, "5 V is no"), (65, -1.0, "V is no")]
)
def test_what_nothing_can_be_brought_to(nm: float, voltage: float | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        normalized(chips(), nm, voltage)


def test_the_command() -> None:
    text = lnpu_command("normalize", "--node", "65", "redmule", "h100", "ganpu").stdout
    (line,) = (line.split() for line in text.splitlines() if line.startswith("  redmule") and " fp16 " in line)
    assert line[-4:] == ["22", "0.65", "0.755", "0.1269"]
    words = " ".join(text.split())
    assert "h100: not brought there, node: 4 nm lies outside the table of processes, 130 ... 7 nm" in words
    assert "between two of the table, as a power of nm: 22 nm" in words
    assert "without a published efficiency at a condition that is told: ganpu" in words
    assert "brought to 65 nm, each at its own voltage" in words
    every = lnpu_command("normalize", "--node", "45", "--voltage", "0.9").stdout
    assert "brought to 45 nm, 0.9 V" in every and all(name in every for name in ("pnpu", "v100", "sparse-inference"))
    assert refused("normalize", "--node", "3") == "node: 3 nm lies outside the table of processes, 130 ... 7 nm\n"
    assert "unknown chip 'tpu'" in refused("normalize", "--node", "65", "tpu")
    assert lnpu_command("normalize").exit_code == 2
