"""A plugin of pytest's: a guest that tests share, and a fresh one with a root disk for each test that wants it.

    def test_the_kernel(ringzero):
        assert ringzero.run(["uname", "-s"], text=True).stdout == "Linux\\n"

Loaded in every run of pytest where ringzero is installed, so it imports nothing of ringzero until a fixture is asked
for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ringzero.machine.machine import Machine

__all__ = ["pytest_addoption", "ringzero", "ringzero_disk"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the fixtures' guests are, on the command line and in the configuration."""
    for name, default, meaning in (
        ("image", "debian", "the image of the fixture `ringzero`"),
        ("disk-image", "debian-full", "the image of the fixture `ringzero_disk`, which has a root disk"),
        ("memory", "512M", "the memory of the fixtures' guests"),
    ):
        parser.addini(f"ringzero_{name.replace('-', '_')}", meaning, default=default)
        parser.addoption(f"--ringzero-{name}", metavar=name.upper(), help=f"{meaning} (default: {default})")


@pytest.fixture(scope="session")
def ringzero(pytestconfig: pytest.Config) -> Iterator[Machine]:
    """A guest that has booted, one for the whole session: what a test leaves there the next one finds."""
    with _booted(pytestconfig, "image") as machine:
        yield machine


@pytest.fixture
def ringzero_disk(pytestconfig: pytest.Config) -> Iterator[Machine]:
    """A guest that has booted from a root disk, a fresh one for each test: its overlay goes with it."""
    with _booted(pytestconfig, "disk-image") as machine:
        yield machine


@contextmanager
def _booted(config: pytest.Config, image: str) -> Iterator[Machine]:
    from ringzero.machine.machine import Machine

    with Machine(_said(config, image), memory=_said(config, "memory"), shell=False) as machine:
        machine.wait_ready(600)
        yield machine


def _said(config: pytest.Config, name: str) -> str:
    """Return an option, from the command line or else from the configuration."""
    given = config.getoption(f"--ringzero-{name}")
    return str(given or config.getini(f"ringzero_{name.replace('-', '_')}"))
