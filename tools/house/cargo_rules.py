"""The import rules of the Rust half: which of our crates may name which, and who may name pyo3."""

import tomllib
from pathlib import Path
from typing import Any

from house.shell import ROOT

# `x86` and `host` stand on nothing of ours. `processor`, `io` and `paravirt` never name each other: they meet
# in `monitor`, which is all that `binding` sees.
GROUND = frozenset({"x86", "host"})
MIDDLE = GROUND | {"memory"}
MAY_NAME: dict[str, frozenset[str]] = {
    "x86": frozenset(),
    "host": frozenset(),
    "memory": GROUND,
    "processor": MIDDLE,
    "io": MIDDLE,
    "paravirt": MIDDLE,
    "monitor": MIDDLE | {"processor", "io", "paravirt"},
    "binding": frozenset({"monitor"}),
}
PREFIX = "ringzero-"
ONLY_BINDING = frozenset({"pyo3", "pyo3-ffi", "pyo3-build-config"})
# Tests obey too: a dev-dependency would let two crates meet behind monitor's back.
TABLES = ("dependencies", "dev-dependencies", "build-dependencies")


def check() -> list[str]:
    """Return every dependency in a crate's Cargo.toml that the import rules forbid."""
    found: list[str] = []
    for folder in sorted((ROOT / "crates").iterdir()):
        manifest = folder / "Cargo.toml"
        if not manifest.exists():
            continue
        if folder.name not in MAY_NAME:
            found.append(
                f"crates/{folder.name} is not in tools/house/cargo_rules.py: say there what it may name"
            )
            continue
        found += findings(folder.name, tomllib.loads(manifest.read_text()))
    return found


def findings(crate: str, manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with one crate's manifest."""
    found: list[str] = []
    targets = [manifest, *manifest.get("target", {}).values()]
    for table in (target.get(name, {}) for target in targets for name in TABLES):
        for key, value in table.items():
            package = str(value.get("package", key)) if isinstance(value, dict) else key
            ours = ours_by_name(package)
            # A crate may name itself: that is how its own tests turn one of its features on.
            if ours is not None and ours != crate and ours not in MAY_NAME[crate]:
                found.append(f"crates/{crate} may not import {ours} (DESIGN: import rules)")
            if package in ONLY_BINDING and crate != "binding":
                found.append(f"crates/{crate} names {package}: only crates/binding may")
    return found


def ours_by_name(package: str) -> str | None:
    """Return the folder name of a crate of ours, called `ringzero-x86` or by its alias `x86`; else None."""
    short = package.removeprefix(PREFIX)
    return short if short in MAY_NAME and Path(ROOT / "crates" / short).is_dir() else None
