"""Debian on several processors."""

import hashlib

import pytest

from ringzero import Machine

from .conftest import ENGINE, Run

pytestmark = pytest.mark.needs_debian

# Each job hashes a stream that its number and `seq` make; the guest runs them all at once.
JOBS = 8
PARALLEL = f"""
for job in $(seq {JOBS}); do
    (seq $job 3 60000 | sha256sum > /tmp/$job) &
done
wait
for job in $(seq {JOBS}); do cut -d' ' -f1 /tmp/$job; done
"""


def sums() -> list[str]:
    """What the jobs must print."""
    streams = ("".join(f"{n}\n" for n in range(job, 60001, 3)) for job in range(1, JOBS + 1))
    return [hashlib.sha256(stream.encode()).hexdigest() for stream in streams]


def test_four_processors_hash_in_parallel_and_get_it_right() -> None:
    with Machine("debian", engine=ENGINE, cpus=4) as machine:
        machine.wait_ready(300)
        assert machine.run(["nproc"], check=True, text=True).stdout == "4\n"
        for _ in range(3):
            assert machine.run(["sh", "-c", PARALLEL], check=True, text=True).stdout.split() == sums()
        online = machine.run(["cat", "/sys/devices/system/cpu/online"], check=True, text=True).stdout
        assert online == "0-3\n"


def test_a_processor_goes_off_line_and_comes_back() -> None:
    script = "cd /sys/devices/system/cpu/cpu1; echo 0 > online; nproc; echo 1 > online; nproc"
    with Machine("debian", engine=ENGINE, cpus=2) as machine:
        machine.wait_ready(300)
        for _ in range(3):
            assert machine.run(["sh", "-c", script], check=True, text=True).stdout == "1\n2\n"


def test_the_interpreter_boots_two(ringzero: Run) -> None:
    done = ringzero("run", "debian", "--cpus", "2", "--", "nproc", engine="interpret")
    assert (done.returncode, done.stdout) == (0, b"2\n"), done.stderr
