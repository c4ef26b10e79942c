"""`ringzero doctor`: what this machine offers, which engine is chosen, and why."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# What each feature is to us. Names as /proc/cpuinfo has them (arch/x86/include/asm/cpufeatures.h, Linux 6.1).
FEATURES = {
    "fsgsbase": ("FSGSBASE", "offered to guests: user space sets its own FS and GS bases"),
    "sse4_2": ("SSE4.2", "the least that guests are offered"),
    "popcnt": ("POPCNT", "offered to guests"),
    "bmi1": ("BMI1", "offered to guests"),
    "bmi2": ("BMI2", "offered to guests; shifts that leave the flags alone"),
    "avx": ("AVX", "offered to guests, executed natively"),
    "avx2": ("AVX2", "offered to guests, executed natively"),
    "fma": ("FMA", "offered to guests, executed natively"),
    "aes": ("AES-NI", "offered to guests, executed natively"),
    "sha_ni": ("SHA", "offered to guests, executed natively"),
    "xsave": ("XSAVE", "vector state is saved as the guest wants it"),
    "rdrand": ("RDRAND", "the guest's random numbers are ready at boot"),
    "constant_tsc": ("constant TSC", "the guest's clock runs evenly"),
    "nonstop_tsc": ("nonstop TSC", "and through the host's sleep"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `good` is None for what is only worth knowing."""

    what: str
    good: bool | None
    value: str
    why: str


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show what this machine offers, which engine is chosen, and why."""
    findings = examine()
    if json:
        import dataclasses
        from json import dumps

        typer.echo(dumps([dataclasses.asdict(one) for one in findings], indent=1))
    else:
        show(findings)
    if any(one.good is False and one.what == "core" for one in findings):
        raise typer.Exit(1)


def show(findings: list[Finding]) -> None:
    """Print the findings as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "WHAT", "FOUND", "WHAT IT IS TO US"):
        table.add_column(heading, overflow="fold")
    marks = {True: "[green]yes[/]", False: "[yellow]no[/]", None: ""}
    for one in findings:
        table.add_row(marks[one.good], one.what, one.value, one.why)
    Console().print(table)


def examine() -> list[Finding]:
    """Return everything that is worth knowing about this machine."""
    return [*_engine(), *_processor(), *_host(), *_packages()]


def _engine() -> list[Finding]:
    try:
        from ringzero import _core
    except ImportError as error:
        return [Finding("core", False, "missing", f"the Rust core cannot be loaded: {error}")]
    engines = _core.engines()
    chosen = engines[0] if engines else "none"
    features = _core.host_features()
    if chosen == "direct" and not features.get("tracing", True):
        chosen = "translate"
    why = {
        "direct": "user code runs as it stands, the kernel's is translated: the fastest here",
        "translate": "guest code is translated for this processor and runs natively: the fastest here",
        "interpret": "the translator is not in this build; the interpreter is slow, but complete",
    }.get(chosen, "no engine is in this build")
    found = [
        Finding("engine", chosen != "none", chosen, why),
        Finding("engines", None, ", ".join(engines), "--engine"),
    ]
    found += [
        Finding(
            name,
            value if isinstance(value, bool) else None,
            "" if isinstance(value, bool) else str(value),
            "core",
        )
        for name, value in features.items()
        if name.lower().replace(".", "_") not in FEATURES
    ]
    return found


def _processor() -> list[Finding]:
    flags: set[str] = set()
    model = "unknown"
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    model = value.strip()
                elif name.strip() == "flags":
                    flags = set(value.split())
                    break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0))
    found = [Finding("processor", None, model, f"{cores} of its cores are ours to use")]
    for flag, (name, why) in FEATURES.items():
        found.append(Finding(name, flag in flags, "", why))
    return found


def _host() -> list[Finding]:
    found = []
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        found.append(Finding("/dev/kvm", True, "usable", "not needed, and not used yet"))
    except OSError as error:
        found.append(Finding("/dev/kvm", None, error.strerror or "no", "not needed: guests are translated"))
    try:
        os.close(os.memfd_create("ringzero-doctor", os.MFD_CLOEXEC))
        found.append(Finding("memfd", True, "", "guest memory lives on one"))
    except OSError as error:
        found.append(
            Finding("memfd", False, error.strerror or "", "guest memory needs it: the kernel refuses it here")
        )
    memory = _meminfo()
    free = memory.get("MemAvailable", 0) // 1024
    found.append(
        Finding("memory", free >= 512, f"{free} MiB free", "a guest takes what it touches, and 40 MiB")
    )
    found.append(Finding("kernel", None, f"{os.uname().sysname} {os.uname().release}", "the host's"))
    return found


def _packages() -> list[Finding]:
    from ringzero.images import find
    from ringzero.images.cache import ImageCache
    from ringzero.images.debian import KERNELS
    from ringzero.images.debian_build import host_kernel

    tools = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]
    missing = f"missing: {', '.join(tools)}" if tools else ""
    found = [Finding("apt", not tools, missing, "fetches Debian's kernels; only needed for ringzero pull")]
    cache = ImageCache()
    here = [f"debian:{series}" for series in KERNELS if find(f"debian:{series}") is not None]
    place = cache.root if cache.root.exists() else cache.root.parent
    writable = os.access(place if place.exists() else place.parent, os.W_OK)
    found.append(Finding("cache", writable, str(cache.root), "images: " + (", ".join(here) or "none yet")))
    own = host_kernel()
    found.append(
        Finding(
            "host's kernel", None, str(own) if own else "none readable in /boot", "ringzero run --kernel FILE"
        )
    )
    return found


def _meminfo() -> dict[str, int]:
    """Return /proc/meminfo, in KiB."""
    try:
        with open("/proc/meminfo", encoding="ascii", errors="replace") as file:
            pairs = (line.split() for line in file)
            return {words[0].rstrip(":"): int(words[1]) for words in pairs if len(words) >= 2}
    except (OSError, ValueError):
        return {}
