"""Rounds of a kind in one machine after the other, until the time is over; and the command line of it."""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from house.shell import Failed, say
from house.soak.kinds import KINDS, MOST_LINES, WORK, Kind
from ringzero import Machine, images
from ringzero.errors import GuestError, RingzeroError
from ringzero.images.newc import NewcWriter
from ringzero.machine.spec import ENGINES

# Seconds. A machine of many rounds has state that a fresh one lacks, and a fresh one does much once: both are wanted.
A_MACHINE = 180.0
READY = {"translate": 120.0, "direct": 120.0, "interpret": 600.0}
A_ROUND = {"translate": 180.0, "direct": 180.0, "interpret": 1800.0}
"""A round that takes longer stands still."""
TOLD = 60.0


@dataclass
class Tally:
    """How many rounds there were, and how many of them came out wrong."""

    rounds: int = 0
    wrong: int = 0

    def __str__(self) -> str:
        return f"{self.rounds} rounds, {self.wrong} wrong"


def soak(kind: Kind, engine: str, cpus: int, seconds: float) -> Tally:
    """Run rounds, at least one; tell of each that comes out wrong, and go on after it in a new machine."""
    tally, end = Tally(), time.monotonic() + seconds
    told = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ringzero-soak-") as scratch_name:
        scratch = Path(scratch_name)
        (files := scratch / "files").mkdir()
        image = image_with(kind.prepare(files), scratch / "initrd")
        while tally.rounds == 0 or time.monotonic() < end:
            with Machine(image, engine=engine, cpus=cpus, memory=kind.memory) as machine:
                until = min(end, time.monotonic() + A_MACHINE)
                wrong: list[str] = []
                while not wrong and (tally.rounds == 0 or time.monotonic() < until):
                    wrong = one_round(kind, machine, engine)
                    tally.rounds += 1
                    if time.monotonic() - told > TOLD:
                        told = time.monotonic()
                        print(f"   {tally}", file=sys.stderr, flush=True)
                if wrong:
                    tally.wrong += 1
                    report(wrong, machine, tally)
    return tally


def image_with(files: dict[str, Path], initrd: Path) -> images.Image:
    """Return the default guest with files of ours below WORK: Linux unpacks one archive behind the other."""
    image = images.pull("debian")
    more = io.BytesIO()
    with NewcWriter(more) as archive:
        archive.directory(WORK)
        for name, path in files.items():
            archive.file(f"{WORK}/{name}", path.read_bytes(), path.stat().st_mode & 0o777)
    first = image.initrd.read_bytes() if image.initrd is not None else b""
    initrd.write_bytes(first + bytes(-len(first) % 4) + more.getvalue())
    return replace(image, initrd=initrd)


def one_round(kind: Kind, machine: Machine, engine: str) -> list[str]:
    """Return what came out wrong in a round; that it did not come to its end is wrong, too."""
    try:
        if not machine.wait_ready(READY[engine]):
            return [f"the guest was not ready after {READY[engine]:g} s"]
        return kind.round(machine, A_ROUND[engine])
    except subprocess.TimeoutExpired:
        return [f"a round did not end within {A_ROUND[engine]:g} s"]
    except (GuestError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]


def report(wrong: Sequence[str], machine: Machine, tally: Tally) -> None:
    """Say what came out wrong, and what the guest's kernel has said."""
    print(f"   WRONG in round {tally.rounds}:", flush=True)
    lines = [*wrong[:MOST_LINES], *([f"... {len(wrong)} lines"] if len(wrong) > MOST_LINES else [])]
    if machine.end_reason is not None:
        lines.append(f"the machine ended: {machine.end_reason}")
    if (panic := machine.panic_message()) is not None:
        lines.append(panic)
    with contextlib.suppress(RingzeroError, OSError, subprocess.TimeoutExpired):
        said = machine.run(["dmesg"], timeout=20.0, text=True).stdout.splitlines()
        lines += [f"dmesg: {line}" for line in said[-MOST_LINES:]]
    for line in lines:
        print(f"      {line}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Read the command line and soak; return 1 when anything came out wrong."""
    parser = argparse.ArgumentParser(prog="tools/dev soak", description=__doc__)
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="only this; may be repeated (default: all)"
    )
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="(default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="processors (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        metavar="M",
        help="for all kinds together (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    kinds = options.kind or list(KINDS)
    wrong = 0
    for name in kinds:
        share = options.minutes / len(kinds)
        words = f"soak {name}: {options.engine}, {options.cpus} processors"
        say(f"{words}, {share:g} minutes")
        try:
            tally = soak(KINDS[name](), options.engine, options.cpus, share * 60.0)
        except (RingzeroError, subprocess.CalledProcessError) as error:
            raise Failed(f"soak {name}: {error}", 2) from error
        say(f"{words}: {tally}")
        wrong += tally.wrong
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Failed as failure:
        print(f"tools/dev: {failure}", file=sys.stderr)
        sys.exit(failure.status)
    except KeyboardInterrupt:
        sys.exit(130)
