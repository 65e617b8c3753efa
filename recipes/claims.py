"""What the papers say of the chip, read from YAML with tag and source. It knows no run and no chip."""

from __future__ import annotations

from typing import Literal

from lnpu_torch.files import Frozen, find, read_yaml

Tag = Literal["published", "derived", "assumed"]


class Claim(Frozen):
    """One figure, or range of figures, in `unit`; `low` and `high` are None where the source has words alone."""

    what: str
    low: float | None
    high: float | None
    unit: str
    tag: Tag
    source: str

    @property
    def text(self) -> str:
        """The figure as the source has it, "37 ... 61 %"."""
        if self.low is None or self.high is None:
            return "in words"
        ends = [self.low] if self.low == self.high else [self.low, self.high]
        return " ... ".join(f"{end:g}" for end in ends) + self._end

    def ours(self, value: float) -> str:
        """Our figure in three digits, "1.60x"; of points the tenths and a sign."""
        return (f"{value:+.1f}" if self.unit == "points" else f"{value:#.3g}".rstrip(".")) + self._end

    @property
    def _end(self) -> str:
        return self.unit if self.unit == "x" else f" {self.unit}"

    def difference(self, ours: float) -> str:
        """How far `ours` lies outside the claim: points of a share, else in percent of its nearer end."""
        if self.low is None or self.high is None:
            return "-"
        if self.low < self.high and self.low <= ours <= self.high:
            return "inside"
        nearer = min(self.low, self.high, key=lambda end: abs(ours - end))
        if self.unit in ("%", "points"):
            return f"{ours - nearer:+.1f} points"
        return f"{100 * (ours / nearer - 1):+.1f} %"


class Claims(Frozen):
    """All claims by key."""

    claims: dict[str, Claim]


def read_claims() -> Claims:
    """The claims in configs/reproduction/claims.yaml."""
    return read_yaml(Claims, find("reproduction", "claims", "file of claims"), "file of claims")
