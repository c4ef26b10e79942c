"""The command line of tools/dev: names the commands and calls their parts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from house import checks, run, setup, tests
from house.conformance import command as conformance
from house.shell import Failed

ENGINES = ("interpret", "translate", "direct")


def parser() -> argparse.ArgumentParser:
    """Return the parser of tools/dev."""
    door = argparse.ArgumentParser(
        prog="tools/dev",
        description="The one door for developers of ringzero. Everything it needs goes into .venv and "
        "target/; what only the system can give, it installs by apt when it may, or says what to type.",
    )
    commands = door.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser(
        "check",
        help="format, lints, types, import rules, docs paths",
        description="Run every check that does not run the program. File lengths only warn.",
    )
    check.add_argument(
        "only", nargs="*", metavar="NAME", help=f"run only these checks; known: {', '.join(checks.CHECKS)}"
    )

    test = commands.add_parser(
        "test",
        help="checks, then cargo's tests, then pytest's",
        description="Run all checks and tests to the end, and fail if any failed. What cannot run here "
        "(no apt mirror, no KVM, not root, no QEMU) is skipped with its reason in pytest's summary.",
    )
    test.add_argument(
        "only", nargs="*", metavar="SUITE", help=f"run only these suites; known: {', '.join(tests.SUITES)}"
    )

    commands.add_parser("guests", help="compile the small guests into python/ringzero/images/builtin/")

    fuzz = commands.add_parser(
        "fuzz",
        help="compare random instructions: native, interpreted, translated",
        description="Run the comparing tests with fresh random seeds until the time is over. A difference "
        "ends the run with status 1 and prints the seed that repeats it.",
    )
    fuzz.add_argument("--minutes", type=float, default=60.0, help="how long (default: 60)")
    fuzz.add_argument(
        "--engine",
        action="append",
        choices=ENGINES,
        help="compare only this engine; may be repeated (default: both)",
    )
    fuzz.add_argument("--seed", type=int, default=None, help="first seed (default: from the clock)")
    fuzz.add_argument(
        "--devices",
        action="store_true",
        help="drive virtio devices as no driver should, and the network behind a card from both sides, instead",
    )

    conform = commands.add_parser(
        "conformance",
        help="run other projects' tests of an x86 processor on each engine",
        description="Run the 64-bit tests of a checkout of kvm-unit-tests that has been built (./configure; make) on "
        "each engine and under QEMU's TCG, or Linux's selftests of x86 or QEMU's tests of its translator natively and "
        "in a guest, print a table, and end with status 1 when one fails on an engine of ours. "
        "What is left out, and why, is in docs/conformance.md.",
    )
    conform.add_argument("--suite", type=Path, metavar="DIR", help="the checkout of kvm-unit-tests")
    conform.add_argument("--linux", type=Path, metavar="DIR", help="a Linux source tree, for its selftests")
    conform.add_argument("--qemu", type=Path, metavar="DIR", help="a QEMU source tree, for its tests/tcg")
    conform.add_argument(
        "--engine", action="append", choices=ENGINES, help="run only on this engine; may be repeated"
    )
    conform.add_argument("--no-tcg", action="store_true", help="do not run under QEMU as well")
    conform.add_argument(
        "--out", type=Path, metavar="DIR", default=conformance.FIGURES, help="where figures and outputs go"
    )
    conform.add_argument("only", nargs="*", metavar="TEST", help="run only these tests")

    soak = commands.add_parser(
        "soak",
        help="run guests that check themselves, for long: what is wrong only rarely shows",
        description="Build, then run guests; see `tools/dev soak --help`.",
        add_help=False,
    )
    soak.add_argument("arguments", nargs=argparse.REMAINDER)

    crash = commands.add_parser(
        "crash",
        help="kill machines while their guests write, and look what is on their disks",
        description="Build, then kill machines; see `tools/dev crash --help`.",
        add_help=False,
    )
    crash.add_argument("arguments", nargs=argparse.REMAINDER)

    bench = commands.add_parser(
        "bench",
        help="`ringzero bench ...` of this tree",
        description="Build, then pass everything on to `ringzero bench`; see `tools/dev bench --help`.",
        add_help=False,
    )
    bench.add_argument("arguments", nargs=argparse.REMAINDER)

    build = commands.add_parser(
        "build", help="build the Rust core, the guests and the Python package into .venv"
    )
    build.add_argument("--wheel", action="store_true", help="make an abi3 wheel in dist/ instead")
    build.add_argument(
        "--force", action="store_true", help="build even if nothing has changed since the last time"
    )

    commands.add_parser(
        "run",
        help="boot the default guest to a prompt",
        description="Build, fetch the default guest, and boot it to a prompt. With no terminal on standard "
        "input: boot it, run tools/demo.sh in it, and end with the status of that.",
    )
    return door


def main(arguments: Sequence[str]) -> int:
    """Run one command of tools/dev and return its exit status."""
    if arguments[:1] in (["soak"], ["crash"], ["bench"]):
        # All that follows is for another parser, options that come first among it, which REMAINDER leaves out.
        options = argparse.Namespace(command=arguments[0], arguments=list(arguments[1:]))
    else:
        options = parser().parse_args(arguments)
    try:
        match options.command:
            case "check":
                return checks.check(options.only)
            case "test":
                return tests.test(options.only)
            case "guests":
                setup.guests()
            case "fuzz" if options.devices:
                return tests.fuzz_devices(options.minutes, options.seed)
            case "fuzz":
                return tests.fuzz(options.minutes, options.seed, options.engine or ENGINES)
            case "conformance":
                setup.prepare()
                columns = [where for where in conformance.COLUMNS if where not in ENGINES]
                columns = [] if options.no_tcg else columns
                columns += [engine for engine in ENGINES if engine in (options.engine or ENGINES)]
                trees = conformance.Trees(options.suite, options.linux, options.qemu)
                return conformance.conformance(trees, options.only, columns, options.out)
            case "soak":
                setup.prepare()
                return run.house_program("house.soak.command", options.arguments)
            case "crash":
                setup.prepare()
                return run.house_program("house.crash.command", options.arguments)
            case "bench":
                setup.prepare()
                return run.ringzero(["bench", *options.arguments])
            case "build":
                if options.wheel:
                    setup.wheel()
                else:
                    setup.prepare(force=options.force)
            case "run":
                setup.prepare()
                return run.default_guest()
    except Failed as failure:
        print(f"tools/dev: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        return 130
    return 0
