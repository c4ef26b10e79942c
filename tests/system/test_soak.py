"""Short soaks: what `tools/dev soak` does for hours."""

import pytest

from house.soak.command import soak
from house.soak.kinds import Pipelines, Torture

pytestmark = pytest.mark.needs_debian

ENGINES = ["translate", "direct"]


@pytest.fixture(autouse=True)
def always_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    # So short a run would hardly be worth it.
    monkeypatch.setenv("RINGZERO_ALWAYS_DIRECT", "1")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_round_of_pipelines_comes_out_right(engine: str) -> None:
    tally = soak(Pipelines(), engine, 2, seconds=0)
    assert (tally.rounds, tally.wrong) == (1, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_round_of_torture_comes_out_right(engine: str) -> None:
    # Each of the workers goes through all the tests once, however long that takes.
    tally = soak(Torture(seconds=1, workers=2), engine, 2, seconds=0)
    assert (tally.rounds, tally.wrong) == (1, 0)
