"""The command `lnpu`, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from lnpu_torch.cli.app import app


def lnpu_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def refused(*arguments: str) -> str:
    """The message of a command that must fail with it alone: exit code 2, on stderr, no traceback."""
    result = lnpu_command(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr
