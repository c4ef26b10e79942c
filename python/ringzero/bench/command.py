"""The command line of the benchmarks; `ringzero.cli` hangs `app` up as `ringzero bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from ringzero.bench import boot as boot_bench
from ringzero.bench import compute as compute_bench
from ringzero.bench import guests, report
from ringzero.bench import idle as idle_bench
from ringzero.bench import nano as nano_bench
from ringzero.bench import profile as profile_bench
from ringzero.bench import programs as programs_bench
from ringzero.bench import system as system_bench
from ringzero.errors import InputError

__all__ = ["app"]

app = typer.Typer(
    help="Measure this machine: always a ratio, interleaved, in one run.",
    no_args_is_help=True,
    add_completion=False,
)


class WithCommand(TyperCommand):
    """What comes after `--` is the guest's: it is in the context's `obj`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the guest's command off before options are looked for."""
        at = args.index("--") if "--" in args else len(args)
        ctx.obj = args[at + 1 :]
        return super().parse_args(ctx, args[:at])


Runs = Annotated[int, typer.Option(min=1, help="Runs of each engine; medians want at least 5.")]
Engine = Annotated[str, typer.Option(help="Our engine: direct, translate or interpret.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON, too.")]
WithoutQemu = Annotated[bool, typer.Option("--without-qemu", help="Measure ringzero alone.")]


def kernels(series: list[str], files: list[Path]) -> list[tuple[str, Path]]:
    """Return the kernels to boot, as (name, file). Raises InputError for a file that is not there."""
    for file in files:
        if not file.is_file():
            raise InputError(f"there is no kernel {file}")
    return [(file.name, file) for file in files] or [(name, guests.kernel(name)) for name in series]


@app.command()
def boot(
    runs: Runs = 5,
    linux: Annotated[list[str] | None, typer.Option(help="Debian kernel series; may be repeated.")] = None,
    kernel: Annotated[list[Path] | None, typer.Option(help="A kernel file instead; may be repeated.")] = None,
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=64, help="Guest memory in MiB.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds after which a run counts as failed.")] = 120.0,
    without_qemu: WithoutQemu = False,
    json: Json = None,
) -> None:
    """Start to power-off of Debian's kernels, against QEMU TCG; how many of the runs got there."""
    console = Console()
    described = report.machine()
    bench = boot_bench.BootBench(
        kernels=kernels(linux or ["6.1", "6.12"], kernel or []),
        engine=engine,
        runs=runs,
        memory=memory,
        timeout=timeout,
        with_qemu=not without_qemu,
    )
    report.say_machine(console, described)
    outcomes = bench.measure(console)
    boot_bench.show(console, outcomes)
    if json is not None:
        report.write_json(json, boot_bench.as_json(outcomes, described))
    if any(len(one.good) < len(one.runs) for one in outcomes):
        raise typer.Exit(1)


@app.command()
def compute(
    runs: Runs = 5,
    linux: Annotated[str, typer.Option(help="Debian kernel series.")] = "6.1",
    kernel: Annotated[Path | None, typer.Option(help="A kernel file instead.")] = None,
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=384, help="Guest memory in MiB.")] = 512,
    timeout: Annotated[
        float, typer.Option(help="Seconds that one boot with the whole set may take.")
    ] = 600.0,
    without_qemu: WithoutQemu = False,
    json: Json = None,
) -> None:
    """Fourteen programs under ringzero, QEMU TCG and on the bare machine, with geometric means."""
    console = Console()
    described = report.machine()
    [(_, file)] = kernels([linux], [kernel] if kernel is not None else [])
    bench = compute_bench.ComputeBench(
        kernel=file, engine=engine, runs=runs, memory=memory, timeout=timeout, with_qemu=not without_qemu
    )
    report.say_machine(console, described)
    results = bench.measure(console)
    compute_bench.show(console, results, engine)
    if json is not None:
        report.write_json(json, compute_bench.as_json(results, described, engine))
    if results.complaints():
        raise typer.Exit(1)


@app.command()
def idle(
    image: Annotated[str, typer.Option(help="The image to boot.")] = "debian",
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=64, help="Guest memory in MiB.")] = 256,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long to watch.")] = 20.0,
    json: Json = None,
) -> None:
    """Processor time and memory of a guest that waits at its prompt."""
    console = Console()
    described = report.machine()
    report.say_machine(console, described)
    measured = idle_bench.IdleBench(image=image, engine=engine, memory=memory, seconds=seconds).measure(
        console
    )
    idle_bench.show(console, measured)
    if json is not None:
        report.write_json(json, idle_bench.as_json(measured, described))


@app.command()
def nano(
    runs: Runs = 5,
    only: Annotated[str, typer.Option(help="Only this operation.")] = "",
    engine: Annotated[
        list[str] | None, typer.Option(help="Our engines; both when none is named. May be repeated.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one run may take.")] = 120.0,
    without_qemu: WithoutQemu = False,
    json: Json = None,
) -> None:
    """Cycles of single operations of a kernel, under each engine, QEMU TCG, and natively where that can be."""
    console = Console()
    described = report.machine()
    bench = nano_bench.NanoBench(
        engines=engine or ["translate", "interpret"],
        runs=runs,
        only=only,
        timeout=timeout,
        with_qemu=not without_qemu,
    )
    report.say_machine(console, described)
    results = bench.measure(console)
    nano_bench.show(console, results)
    if json is not None:
        report.write_json(json, nano_bench.as_json(results, described))
    if results.complaints():
        raise typer.Exit(1)


@app.command()
def system(
    runs: Runs = 5,
    only: Annotated[str, typer.Option(help="Only this item.")] = "",
    linux: Annotated[str, typer.Option(help="Debian kernel series.")] = "6.1",
    kernel: Annotated[Path | None, typer.Option(help="A kernel file instead.")] = None,
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=128, help="Guest memory in MiB.")] = 512,
    timeout: Annotated[float, typer.Option(help="Seconds that one boot with all items may take.")] = 300.0,
    without_qemu: WithoutQemu = False,
    json: Json = None,
) -> None:
    """Latencies of the guest's kernel, as lmbench measures them, under ringzero, QEMU TCG and on the bare machine."""
    console = Console()
    described = report.machine()
    [(_, file)] = kernels([linux], [kernel] if kernel is not None else [])
    bench = system_bench.SystemBench(
        kernel=file,
        engine=engine,
        runs=runs,
        only=only,
        memory=memory,
        timeout=timeout,
        with_qemu=not without_qemu,
    )
    report.say_machine(console, described)
    measured = bench.measure(console)
    system_bench.show(console, measured)
    if json is not None:
        report.write_json(json, system_bench.as_json(measured, described, engine))
    if measured.complaints():
        raise typer.Exit(1)


@app.command()
def programs(
    runs: Runs = 5,
    only: Annotated[list[str] | None, typer.Option(help="Only this item; may be repeated.")] = None,
    coremark: Annotated[Path | None, typer.Option(help="Folder with the source of EEMBC's CoreMark.")] = None,
    linux: Annotated[str, typer.Option(help="Debian kernel series.")] = "6.1",
    kernel: Annotated[Path | None, typer.Option(help="A kernel file instead.")] = None,
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=512, help="Guest memory in MiB.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds that one boot with all items may take.")] = 600.0,
    without_qemu: WithoutQemu = False,
    json: Json = None,
) -> None:
    """openssl, python3, xz, sqlite3, gcc and CoreMark under ringzero, QEMU TCG and on the bare machine."""
    console = Console()
    described = report.machine()
    [(_, file)] = kernels([linux], [kernel] if kernel is not None else [])
    bench = programs_bench.ProgramsBench(
        kernel=file,
        engine=engine,
        runs=runs,
        only=only or [],
        coremark=coremark,
        memory=memory,
        timeout=timeout,
        with_qemu=not without_qemu,
    )
    report.say_machine(console, described)
    results, clocks = bench.measure(console)
    programs_bench.show(console, results, clocks)
    if json is not None:
        report.write_json(json, programs_bench.as_json(results, clocks, described, engine))
    if results.complaints() or clocks:
        raise typer.Exit(1)


@app.command(cls=WithCommand)
def profile(
    context: typer.Context,
    image: Annotated[str, typer.Argument(metavar="[IMAGE] [-- CMD ARG...]", help="For CMD.")] = "debian",
    workload: Annotated[
        list[str] | None, typer.Option(help="An item of bench compute or bench system; may be repeated.")
    ] = None,
    linux: Annotated[str, typer.Option(help="Debian kernel series to boot.")] = "6.1",
    kernel: Annotated[Path | None, typer.Option(help="A kernel file instead.")] = None,
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=64, help="Guest memory in MiB.")] = 512,
    cpus: Annotated[int, typer.Option(min=1, help="Processors.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that a guest may take.")] = 600.0,
    cold: Annotated[bool, typer.Option("--cold", help="Without translations of earlier runs.")] = False,
    most: Annotated[int, typer.Option(min=0, help="How many instructions and blocks to show.")] = 12,
    json: Json = None,
) -> None:
    """Where a guest's time goes: a boot to power-off, items of bench compute, or a command in an image."""
    console = Console()
    described = report.machine()
    command: list[str] = context.obj
    file = None
    if not command:
        [(_, file)] = kernels([linux], [kernel] if kernel is not None else [])
    bench = profile_bench.ProfileBench(
        kernel=file,
        items=workload or [],
        image=image,
        command=command,
        engine=engine,
        memory=memory,
        cpus=cpus,
        cold=cold,
        timeout=timeout,
    )
    reports = bench.measure(console)
    profile_bench.show(console, reports, most)
    if json is not None:
        report.write_json(json, profile_bench.as_json(reports, described, engine))
