"""The command line of the benchmarks; `ringzero.cli` hangs `app` up as `ringzero bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperCommand

from ringzero.bench import boot as boot_bench
from ringzero.bench import compute as compute_bench
from ringzero.bench import guests, report
from ringzero.bench import idle as idle_bench
from ringzero.bench import memory_balloon as balloon_bench
from ringzero.bench import nano as nano_bench
from ringzero.bench import profile as profile_bench
from ringzero.bench import programs as programs_bench
from ringzero.bench import system as system_bench
from ringzero.bench.io import command as io_bench
from ringzero.bench.memory import command as memory_bench
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
Linux = Annotated[str, typer.Option(help="Debian kernel series.")]
Kernel = Annotated[Path | None, typer.Option(help="A kernel file instead.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON, too.")]
WithoutQemu = Annotated[bool, typer.Option("--without-qemu", help="Measure ringzero alone.")]


def kernels(series: list[str], files: list[Path]) -> list[tuple[str, Path]]:
    """Return the kernels to boot, as (name, file). Raises InputError for a file that is not there."""
    for file in files:
        if not file.is_file():
            raise InputError(f"there is no kernel {file}")
    return [(file.name, file) for file in files] or [(name, guests.kernel(name)) for name in series]


def one_kernel(series: str, file: Path | None) -> Path:
    """Return the one kernel to boot. Raises InputError for a file that is not there."""
    [(_, found)] = kernels([series], [file] if file is not None else [])
    return found


Measured = TypeVar("Measured")


def finish(
    measure: Callable[[Console], Measured],
    show: Callable[[Console, Measured], None],
    as_json: Callable[[Measured, dict[str, Any]], dict[str, Any]],
    complaints: Callable[[Measured], Sequence[object]],
    json: Path | None,
) -> None:
    """Do what every command does: name the machine, measure, show, write; status 1 with complaints."""
    console, described = Console(), report.machine()
    report.say_machine(console, described)
    measured = measure(console)
    show(console, measured)
    if json is not None:
        report.write_json(json, as_json(measured, described))
    if complaints(measured):
        raise typer.Exit(1)


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
    bench = boot_bench.BootBench(
        kernels=kernels(linux or ["6.1", "6.12"], kernel or []),
        engine=engine,
        runs=runs,
        memory=memory,
        timeout=timeout,
        with_qemu=not without_qemu,
    )
    finish(bench.measure, boot_bench.show, boot_bench.as_json, boot_bench.failed, json)


@app.command()
def compute(
    runs: Runs = 5,
    linux: Linux = "6.1",
    kernel: Kernel = None,
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=384, help="Guest memory in MiB.")] = 512,
    timeout: Annotated[
        float, typer.Option(help="Seconds that one boot with the whole set may take.")
    ] = 600.0,
    without_qemu: WithoutQemu = False,
    json: Json = None,
) -> None:
    """Fourteen programs under ringzero, QEMU TCG and on the bare machine, with geometric means."""
    file = one_kernel(linux, kernel)
    bench = compute_bench.ComputeBench(
        kernel=file, engine=engine, runs=runs, memory=memory, timeout=timeout, with_qemu=not without_qemu
    )
    finish(
        bench.measure,
        lambda console, results: compute_bench.show(console, results, engine),
        lambda results, machine: compute_bench.as_json(results, machine, engine),
        lambda results: results.complaints(),
        json,
    )


@app.command()
def idle(
    image: Annotated[str, typer.Option(help="The image to boot.")] = "debian",
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=64, help="Guest memory in MiB.")] = 256,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long to watch.")] = 20.0,
    json: Json = None,
) -> None:
    """Processor time and memory of a guest that waits at its prompt."""
    bench = idle_bench.IdleBench(image=image, engine=engine, memory=memory, seconds=seconds)
    finish(bench.measure, idle_bench.show, idle_bench.as_json, lambda _: [], json)


@app.command()
def balloon(
    image: Annotated[str, typer.Option(help="The image to boot.")] = "debian",
    engine: Engine = "direct",
    runs: Runs = 5,
    give: Annotated[int, typer.Option(min=0, help="MiB to inflate for the rate; 0 for no rate.")] = 1024,
    size: Annotated[
        list[int] | None, typer.Option(help="MiB that a ballooned guest is left with; may be repeated.")
    ] = None,
    full: Annotated[int, typer.Option(min=128, help="MiB that it begins with.")] = 256,
    only_rate: Annotated[bool, typer.Option("--only-rate", help="Without the file server.")] = False,
    json: Json = None,
) -> None:
    """How fast memory is ballooned, and a ballooned file server against one that natively has as much memory."""
    sizes = [] if only_rate else size or list(balloon_bench.BalloonBench.sizes)
    bench = balloon_bench.BalloonBench(
        image=image, engine=engine, runs=runs, give=give, sizes=sizes, full=full
    )
    finish(bench.measure, balloon_bench.show, balloon_bench.as_json, balloon_bench.complaints, json)


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
    bench = nano_bench.NanoBench(
        engines=engine or ["translate", "interpret"],
        runs=runs,
        only=only,
        timeout=timeout,
        with_qemu=not without_qemu,
    )
    finish(bench.measure, nano_bench.show, nano_bench.as_json, lambda results: results.complaints(), json)


@app.command()
def system(
    runs: Runs = 5,
    only: Annotated[str, typer.Option(help="Only this item.")] = "",
    linux: Linux = "6.1",
    kernel: Kernel = None,
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=128, help="Guest memory in MiB.")] = 512,
    timeout: Annotated[float, typer.Option(help="Seconds that one boot with all items may take.")] = 300.0,
    without_qemu: WithoutQemu = False,
    json: Json = None,
) -> None:
    """Latencies of the guest's kernel, as lmbench measures them, under ringzero, QEMU TCG and on the bare machine."""
    file = one_kernel(linux, kernel)
    bench = system_bench.SystemBench(
        kernel=file,
        engine=engine,
        runs=runs,
        only=only,
        memory=memory,
        timeout=timeout,
        with_qemu=not without_qemu,
    )
    finish(
        bench.measure,
        system_bench.show,
        lambda measured, machine: system_bench.as_json(measured, machine, engine),
        lambda measured: measured.complaints(),
        json,
    )


@app.command()
def programs(
    runs: Runs = 5,
    only: Annotated[list[str] | None, typer.Option(help="Only this item; may be repeated.")] = None,
    coremark: Annotated[Path | None, typer.Option(help="Folder with the source of EEMBC's CoreMark.")] = None,
    linux: Linux = "6.1",
    kernel: Kernel = None,
    engine: Engine = "direct",
    memory: Annotated[int, typer.Option(min=512, help="Guest memory in MiB.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds that one boot with all items may take.")] = 600.0,
    without_qemu: WithoutQemu = False,
    json: Json = None,
) -> None:
    """openssl, python3, xz, sqlite3, gcc and CoreMark under ringzero, QEMU TCG and on the bare machine."""
    file = one_kernel(linux, kernel)
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
    finish(
        bench.measure,
        lambda console, measured: programs_bench.show(console, *measured),
        lambda measured, machine: programs_bench.as_json(*measured, machine, engine),
        lambda measured: [*measured[0].complaints(), *measured[1]],
        json,
    )


@app.command(cls=WithCommand)
def profile(
    context: typer.Context,
    image: Annotated[str, typer.Argument(metavar="[IMAGE] [-- CMD ARG...]", help="For CMD.")] = "debian",
    workload: Annotated[
        list[str] | None, typer.Option(help="An item of bench compute or bench system; may be repeated.")
    ] = None,
    linux: Annotated[str, typer.Option(help="Debian kernel series to boot.")] = "6.1",
    kernel: Kernel = None,
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
        file = one_kernel(linux, kernel)
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


app.command("memory")(memory_bench.chosen)
app.command("io")(io_bench.chosen)
