"""User code of Debian that runs as it stands."""

import hashlib

import pytest

from ringzero import Machine

from .conftest import ENGINE

pytestmark = [
    pytest.mark.needs_debian,
    pytest.mark.skipif(ENGINE != "direct", reason="RINGZERO_TEST_ENGINE is another engine"),
]

SUM = "BEGIN { for (i = 0; i < 300000; i++) s += i % 7; print s }"
SORTED = (
    "seq 1 20000 | awk '{ print ($1 * 7919) % 20011, $1 }' | sort -n | cut -d' ' -f2 | sort -n | sha256sum"
)


def counters(machine: Machine) -> dict[str, int]:
    """What direct execution did, or skip the test where the host does not allow it."""
    stats = machine.stats()
    if stats["direct.impossible"]:
        pytest.skip("this host lets no process of ours trace a child")
    return {name: value for name, value in stats.items() if name.startswith("direct.")}


def test_a_program_that_computes_runs_directly() -> None:
    with Machine("debian", engine=ENGINE) as machine:
        machine.wait_ready(300)
        done = machine.run(["awk", SUM], check=True, text=True)
        assert int(done.stdout) == sum(i % 7 for i in range(300000))
        found = counters(machine)
    assert found["direct.excursions"] > 10
    assert found["direct.nanoseconds"] > 5_000_000
    assert found["direct.resets"] == 0


def test_translation_alone_can_be_asked_for() -> None:
    with Machine("debian", engine="translate") as machine:
        machine.wait_ready(300)
        machine.run(["awk", SUM], check=True)
        assert not [name for name in machine.stats() if name.startswith("direct.")]


@pytest.mark.parametrize("cpus", [1, 3])
def test_whatever_runs_directly_comes_out_right(cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Also what is not worth it: every system call and every fault of every process crosses over.
    monkeypatch.setenv("RINGZERO_ALWAYS_DIRECT", "1")
    wanted = hashlib.sha256("".join(f"{n}\n" for n in range(1, 20001)).encode()).hexdigest()
    with Machine("debian", engine=ENGINE, cpus=cpus) as machine:
        machine.wait_ready(300)
        script = f"for job in 1 2 3; do ({SORTED} > /tmp/$job) & done; wait; cat /tmp/1 /tmp/2 /tmp/3"
        for _ in range(2):
            found = machine.run(["sh", "-c", script], check=True, text=True).stdout
            assert found == f"{wanted}  -\n" * 3
        assert counters(machine)["direct.excursions"] > 1000
