"""Machines for the tests that boot guests."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from ringzero import Machine

ENGINE = os.environ.get("RINGZERO_TEST_ENGINE", "direct")
"""The engine of most tests. The interpreter takes some 15 s a boot, so each of its boots is chosen."""

Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="module")
def debian() -> Iterator[Machine]:
    """Give one booted Debian with agent and shell to all tests of a module."""
    with Machine("debian", engine=ENGINE) as machine:
        machine.wait_ready(300)
        yield machine


@pytest.fixture
def ringzero() -> Run:
    """Run the command line as a user does, with nothing on standard input unless told otherwise."""

    def run(*arguments: str, engine: str = ENGINE, **options: object) -> subprocess.CompletedProcess[bytes]:
        if not {"stdin", "input"} & options.keys():
            options["stdin"] = subprocess.DEVNULL
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("timeout", 300)
        command = [sys.executable, "-m", "ringzero", arguments[0], "--engine", engine, *arguments[1:]]
        return subprocess.run(command, stderr=subprocess.PIPE, check=False, **options)

    return run
