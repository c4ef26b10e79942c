"""What every benchmark says beside its figures: the machine, the programs, the date; a table and JSON."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from ringzero.bench.engines import qemu_version
from ringzero.errors import InputError

__all__ = ["machine", "milliseconds", "ratio", "say_machine", "write_json"]


def machine() -> dict[str, Any]:
    """Return what was measured on what."""
    return {
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "ringzero": package_version(),
        "qemu": qemu_version(),
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor_name() -> str:
    """Return the host processor's name as Linux gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def package_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("ringzero")
    except PackageNotFoundError:
        return "not installed"


def say_machine(console: Console, described: dict[str, Any]) -> None:
    """Print the machine in two lines, above a table."""
    console.print(f"{described['processor']}, {described['processors']} processors, {described['system']}")
    console.print(f"ringzero {described['ringzero']}; {described['qemu'] or 'no QEMU'}; {described['date']}")
    if described["load"] > 0.5:
        console.print(
            f"[yellow]The machine is busy (load {described['load']:.1f}): medians will be worse.[/yellow]"
        )


def milliseconds(seconds: float) -> str:
    """Return a time for a table whose title names the unit."""
    return f"{seconds * 1000:,.1f}" if seconds < 0.1 else f"{seconds * 1000:,.0f}"


def ratio(value: float) -> str:
    """Return a ratio for a table."""
    return f"{value:.2f}x"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a report. Raises InputError if the file cannot be written."""
    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"the report cannot be written to {path}: {error.strerror or error}") from error
