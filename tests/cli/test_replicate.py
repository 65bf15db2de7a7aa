"""`--replicate` says how often a VM is copied, and to how many hosts."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from volant.cli._create import replicate_option
from volant.model import Replicate


def read(text: str) -> tuple[int, str]:
    """Returns the exit code of a command with the option, and what it says."""

    @click.command()
    @replicate_option
    def command(replicate: Replicate | None) -> None:
        click.echo(replicate and f"{replicate.every} {replicate.to}")

    done = CliRunner().invoke(command, ["--replicate", text])
    return done.exit_code, done.output.strip()


@pytest.mark.parametrize(("text", "wanted"), [("5m", "5m 1"), ("90s:3", "90s 3"), ("soon:2", "soon 2")])
def test_a_replica_goes_to_one_host_unless_there_is_a_number(text: str, wanted: str) -> None:
    """The daemon says whether it is a duration."""
    assert read(text) == (0, wanted)


@pytest.mark.parametrize("text", ["5m:", "5m:0", "5m:4", "5m:two"])
def test_a_number_of_hosts_that_there_can_not_be_is_refused(text: str) -> None:
    code, said = read(text)
    assert (code, "write it like 5m or 5m:2" in said) == (2, True)
