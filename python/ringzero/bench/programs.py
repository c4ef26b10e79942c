"""`ringzero bench programs`: real programs, the same files in the guest, under QEMU TCG and on the bare machine.

They are Debian's (`debian_programs.py`) over data that is made here, and EEMBC's CoreMark when its source is at hand.
What each prints must be the same on every engine. `openssl speed` measures itself and prints nothing that can be
compared: the same algorithms also run over a file, for their result. `gcc` is its compiler proper, without the
assembler.
"""

from __future__ import annotations

import io
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ringzero.bench import guests, report
from ringzero.bench.clocked import clock_complaint
from ringzero.bench.debian_programs import LIBRARIES, LOADER, find_program, unpack_programs
from ringzero.bench.engines import Guest, Run, qemu_command, ringzero_command, run
from ringzero.bench.rounds import Measured, Results, parse
from ringzero.errors import GuestError, InputError
from ringzero.images.newc import NewcWriter

__all__ = ["BARS", "ProgramsBench", "told"]

BARS = {
    "coremark": 3.0,
    "openssl-sha256": 10.0,
    "openssl-aes-cbc": 10.0,
    "openssl-rsa2048": 10.0,
    "python3": 3.0,
    "xz": 3.0,
    "sqlite3": 3.0,
    "gcc": 3.0,
}
"""The items, and how many times as fast as QEMU's translator each is to be."""

# Run for their results alone.
CHECKS = ("check-sha256", "check-aes-cbc", "check-rsa2048")
APPEND = "console=ttyS0 quiet panic=-1"
COREMARK_ITERATIONS = 6000
TOLD = re.compile(r"PROGRAM-TOLD ([a-z0-9-]+) \+F2?:\d+:([^:]+):([0-9.]+)")
MEGABYTE = 1_000_000


def told(done: Run) -> dict[str, float]:
    """Return what `openssl speed` said, by item: nanoseconds a megabyte, or a signature.

    With -mr it prints "+F:number:algorithm:bytes a second" and "+F2:number:bits:signatures a second:...".
    """
    found = {}
    for _, text in done.lines:
        line = TOLD.search(text)
        if line is not None:
            a_second = float(line[3]) / (1 if line[2].isdigit() else MEGABYTE)
            found[line[1]] = 1e9 / a_second if a_second else float("inf")
    return found


def measured(done: Run) -> dict[str, Measured]:
    """Return what a run measured, by item. Raises GuestError if it is not whole."""
    items = parse(done, "PROGRAM")
    for name, nanoseconds in told(done).items():
        items[name] = Measured((nanoseconds,), items[name].checksums)
    missing = [name for name, one in items.items() if name.startswith("openssl-") and name not in told(done)]
    if missing:
        raise GuestError(f"{missing[0]} did not say how fast it was: {done.tail()}")
    return items


@dataclass(frozen=True)
class ProgramsBench:
    """What to measure. `coremark` is the folder of its source, `memory` in MiB, `timeout` (one boot) in seconds."""

    kernel: Path
    engine: str = "direct"
    runs: int = 5
    only: Sequence[str] = ()
    coremark: Path | None = None
    memory: int = 1024
    timeout: float = 600.0
    with_qemu: bool = True

    def measure(self, console: Console) -> tuple[Results, list[str]]:
        """Run everything, interleaved; return the results, and which clocks were wrong."""
        for name in self.only:
            if name not in BARS or (name == "coremark" and self.coremark is None):
                raise InputError(
                    f"there is no item {name!r}: choose from {', '.join(BARS)} (coremark with --coremark)"
                )
        results, clocks = Results([*BARS, *CHECKS]), []
        shm = Path("/dev/shm")
        with tempfile.TemporaryDirectory(
            prefix="ringzero-bench-", dir=shm if shm.is_dir() else None
        ) as scratch:
            folder, initrd = Path(scratch) / "work", Path(scratch) / "initrd"
            folder.mkdir()
            with console.status("fetching and unpacking Debian's programs"):
                self.prepare(folder)
            initrd.write_bytes(initramfs(folder))
            guest = Guest(self.kernel, initrd, f"{APPEND} -- programs /work", self.memory)
            commands = {self.engine: ringzero_command(guest, engine=self.engine)}
            if self.with_qemu:
                commands["qemu"] = qemu_command(guest)
            commands["native"] = [str(guests.program()), "programs", str(folder)]
            for turn in range(self.runs):
                for engine in commands if turn % 2 == 0 else reversed(commands):
                    with console.status(f"run {turn + 1} of {self.runs}: {engine}"):
                        done = run(commands[engine], timeout=self.timeout)
                    try:
                        results.add(engine, measured(done))
                        complaint = clock_complaint(done, "PROGRAM")
                    except GuestError as error:
                        raise GuestError(f"run {turn + 1}, {engine}: {error}") from error
                    if complaint is not None:
                        clocks.append(f"run {turn + 1}, {engine}: {complaint}")
        return results, clocks

    def prepare(self, folder: Path) -> None:
        """Fill a folder with the programs, their data and the list of what is run."""
        root = folder / "root"
        unpack_programs(root)
        make_data(folder)
        start = [f"root/{LOADER}", "--library-path", f"root/{LIBRARIES}"]
        program = {
            name: [*start, str(find_program(root, name).relative_to(folder))]
            for name in ("openssl", "python3", "sqlite3", "xz", "cc1")
        }
        key = [*program["openssl"], "genrsa", "-out", "key", "2048"]
        subprocess.run(key, cwd=folder, check=True, capture_output=True)
        speed = [*program["openssl"], "speed", "-mr", "-elapsed", "-seconds", "1"]
        aes = ["enc", "-aes-256-cbc", "-K", "0f" * 32, "-iv", "a5" * 16, "-in", "text"]
        items = {
            "openssl-sha256": ("speed", "-", [*speed, "-bytes", "16384", "-evp", "sha256"]),
            "openssl-aes-cbc": ("speed", "-", [*speed, "-bytes", "16384", "-evp", "aes-256-cbc"]),
            "openssl-rsa2048": ("speed", "-", [*speed, "rsa2048"]),
            "check-sha256": ("sum", "-", [*program["openssl"], "dgst", "-sha256", "text"]),
            "check-aes-cbc": ("sum", "-", [*program["openssl"], *aes]),
            "check-rsa2048": ("sum", "-", [*program["openssl"], "dgst", "-sha256", "-sign", "key", "text"]),
            "python3": ("sum", "-", [*program["python3"], "-I", "-S", "loop.py"]),
            "xz": ("sum", "text", [*program["xz"], "-6", "-T1", "-c"]),
            "sqlite3": ("sum", "queries", [*program["sqlite3"], ":memory:"]),
            "gcc": ("sum", "-", [*program["cc1"], "-quiet", "-fpreprocessed", "-O2", "-o", "-", "source.c"]),
        }
        if self.coremark is not None:
            compile_coremark(self.coremark, folder / "coremark")
            words = ["./coremark", "0x0", "0x0", "0x66", str(COREMARK_ITERATIONS), "7", "1", "2000"]
            items["coremark"] = ("crc", "-", words)
        checks = {f"openssl-{name.removeprefix('check-')}": name for name in CHECKS}
        wanted = {*self.only, *(checks[name] for name in self.only if name in checks)} or set(items)
        lines = [
            "\t".join([name, kind, source, *words])
            for name, (kind, source, words) in items.items()
            if name in wanted
        ]
        (folder / "programs").write_text("\n".join(lines) + "\n")


def compile_coremark(source: Path, target: Path) -> None:
    """Compile CoreMark from its source tree, static. Raises InputError when that cannot be."""
    if not (source / "core_main.c").is_file():
        raise InputError(f"{source} does not hold CoreMark's source (github.com/eembc/coremark)")
    if shutil.which("gcc") is None:
        raise InputError("CoreMark is compiled with gcc, which is not on the PATH")
    sources = [*sorted(source.glob("core_*.c")), source / "posix" / "core_portme.c"]
    flags = [
        "-O2",
        "-static",
        f"-I{source}",
        f"-I{source / 'posix'}",
        "-DPERFORMANCE_RUN=1",
        '-DFLAGS_STR="-O2"',
    ]
    done = subprocess.run(
        ["gcc", *flags, *map(str, sources), "-o", str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise InputError(f"CoreMark in {source} does not compile: {done.stderr.strip().splitlines()[-1:]}")


PYTHON_LOOP = """\
def queens(size, row=0, columns=0, left=0, right=0):
    if row == size:
        return 1
    count = 0
    free = ~(columns | left | right) & ((1 << size) - 1)
    while free:
        bit = free & -free
        free ^= bit
        count += queens(size, row + 1, columns | bit, (left | bit) << 1, (right | bit) >> 1)
    return count


class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def moved(self, by):
        return Point(self.x + by, self.y * 0.5 + by)


words, point, total = {}, Point(0, 0.0), 0
for i in range(60000):
    key = f"k{i * 7919 % 5003}"
    words[key] = words.get(key, 0) + i
    point = point.moved(i % 3)
    total += sum([j * j for j in range(i % 7)])
print(queens(8), len(words), max(words.values()), point.x, round(point.y, 9), total)
"""

QUERIES = """\
CREATE TABLE item (id INTEGER PRIMARY KEY, kind INTEGER, name TEXT, price REAL);
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000)
  INSERT INTO item SELECT i, i * 7919 % 211, 'item ' || (i * 104729 % 99991), i * 31 % 1000 / 8.0 FROM n;
COMMIT;
CREATE INDEX by_name ON item (name);
SELECT kind, count(*), sum(price), max(name) FROM item GROUP BY kind ORDER BY 3 DESC, 1 LIMIT 20;
SELECT count(*), sum(a.price * b.price) FROM item a JOIN item b ON b.id = a.kind + a.id % 97 + 1 WHERE a.price > 20;
UPDATE item SET price = price * 1.25 WHERE name LIKE '%7%';
SELECT name, price FROM item WHERE name BETWEEN 'item 5' AND 'item 52' ORDER BY price DESC, name LIMIT 25;
DELETE FROM item WHERE kind % 3 = 0;
SELECT count(*), round(sum(price), 6), count(DISTINCT name) FROM item;
"""


def make_data(folder: Path) -> None:
    """Write what the programs work on: the same bytes on every machine."""
    numbers = random.Random(20061021)
    words = ["".join(numbers.choices("etaoinshrdlu", k=numbers.randint(2, 9))) for _ in range(3000)]
    lines = [" ".join(numbers.choices(words, k=12)) for _ in range(16000)]
    (folder / "text").write_text("\n".join(lines) + "\n")
    (folder / "loop.py").write_text(PYTHON_LOOP)
    (folder / "queries").write_text(QUERIES)
    functions = [
        f"""
struct s{n} {{ int a[{n % 7 + 2}]; long b; struct s{n} *next; }};
static long walk{n}(const struct s{n} *at, int depth)
{{
    long sum = 0;
    for (int i = 0; at && i < depth; i++, at = at->next) {{
        for (unsigned j = 0; j < sizeof at->a / sizeof *at->a; j++)
            sum += at->a[j] % {n + 3} ? at->a[j] * at->b : sum >> {n % 5 + 1};
        switch (sum & 7) {{
        case 0: sum ^= {n * 7919}; break;
        case {n % 6 + 1}: sum = -sum; break;
        default: sum += depth * {n}; break;
        }}
    }}
    return sum;
}}
long entry{n}(struct s{n} *list, double x)
{{
    long deep = walk{n}(list, {n % 90 + 10});
    return deep > (long)(x * {n}.5) ? deep / {n + 1} : walk{n}(list->next, (int)x) + deep;
}}"""
        for n in range(90)
    ]
    (folder / "source.c").write_text("\n".join(functions) + "\n")


def initramfs(folder: Path) -> bytes:
    """Return an initramfs with the bench program as /init and a folder as /work."""
    out = io.BytesIO()
    with NewcWriter(out) as archive:
        guests.basics(archive)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.file(f"work/{path.relative_to(folder)}", path.read_bytes(), path.stat().st_mode & 0o777)
    return out.getvalue()


def show(console: Console, results: Results, clocks: Sequence[str]) -> None:
    """Print the table."""
    [engine] = results.ours
    table = Table(
        title=f"real programs, medians in ms; ours is {engine}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("item", no_wrap=True)
    for heading in ("native", "ours", "spread", "ours / native", "QEMU", "QEMU / ours", "bar"):
        table.add_column(heading, justify="right")
    for name in (name for name in results.names if name in BARS):
        samples = {one: results.sample(one, name) for one in ("native", engine, "qemu")}
        words = {one: milliseconds(value.median) for one, value in samples.items() if value is not None}
        ours = samples[engine]
        ratios = (results.ratio(engine, "native", name), results.ratio("qemu", engine, name))
        to_native, to_qemu = (report.ratio(value) if value is not None else "-" for value in ratios)
        spread = f"±{ours.spread:.0%}" if ours is not None else ""
        table.add_row(
            name,
            words["native"],
            words[engine],
            spread,
            to_native,
            words.get("qemu", "-"),
            to_qemu,
            f"{BARS[name]:g}x",
        )
    console.print(table)
    for complaint in (*results.complaints(), *clocks):
        console.print(f"WRONG: {complaint}", markup=False, style="red")


def milliseconds(nanoseconds: float) -> str:
    """Return a time for the table."""
    value = nanoseconds / 1e6
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def as_json(
    results: Results, clocks: Sequence[str], described: dict[str, Any], engine: str
) -> dict[str, Any]:
    """Return the report."""
    return {
        "bench": "programs",
        "machine": described,
        "engine": engine,
        "bars": BARS,
        "results": results.as_json("nanoseconds"),
        "complaints": [*results.complaints(), *clocks],
    }
