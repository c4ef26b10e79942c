"""Rules on the text of the sources: where unsafe may be, how long a file may be, what it may not name."""

import re
from pathlib import Path

from house.shell import ROOT, tracked_files

# ANCHORS rule 2: unsafe Rust lives in these places, each opening with its contract (a `//!` comment).
UNSAFE_PLACES = (
    "crates/host/",
    "crates/memory/src/bytes.rs",
    "crates/memory/src/tlb.rs",
    "crates/processor/src/code_cache.rs",
    "crates/processor/src/translate/enter.rs",
    "crates/processor/src/kvm/",
    # SIMD and x87 instructions of the interpreter on the bare processor, and (folder) the oracle of the comparing
    # tests: docs/decisions/0001-unsafe-for-native-instructions.md.
    "crates/processor/src/native.rs",
    "crates/processor/src/native/",
)
FORBID_UNSAFE = ("x86", "io", "paravirt", "monitor")
LONG = 600

# In pieces, so that this file passes its own check.
REGISTRIES = tuple(
    ".".join(parts)
    for parts in (
        ("crates", "io"),
        ("static", "rust-lang", "org"),
        ("sh", "rustup", "rs"),
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry", "npmjs", "org"),
        ("deb", "debian", "org"),
        ("security", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("proxy", "golang", "org"),
        ("ghcr", "io"),
        ("docker", "io"),
        ("quay", "io"),
    )
)
# Written by cargo, which names its own source there.
MACHINE_WRITTEN = {Path("Cargo.lock")}

COMMENT_OR_STRING = re.compile(
    r"""//[^\n]*                     # a line comment, doc comments too
      | /\*.*?\*/                    # a block comment
      | r(?P<hashes>\#*)".*?"(?P=hashes)
      | "(?:\\.|[^"\\])*"
    """,
    re.DOTALL | re.VERBOSE,
)


def code_only(source: str) -> str:
    """Return Rust source without comments and strings, its lines in their places."""
    return COMMENT_OR_STRING.sub(lambda match: "\n" * match[0].count("\n") or " ", source)


def unsafe_in_its_places() -> list[str]:
    """Return uses of unsafe outside its places, places without a contract, and `forbid`s that are gone."""
    found: list[str] = []
    for path in (path for path in tracked_files() if path.suffix == ".rs"):
        text = (ROOT / path).read_text()
        lines = [
            number
            for number, line in enumerate(code_only(text).splitlines(), 1)
            # An attribute names unsafe without doing anything unsafe.
            if re.search(r"\bunsafe\b(?!\s*\()", line)
        ]
        if not lines:
            continue
        if not str(path).startswith(UNSAFE_PLACES):
            found.append(
                f"{path}:{lines[0]}: unsafe code outside the places that tools/house/source_rules.py lists"
            )
        elif not text.lstrip().startswith("//!"):
            found.append(f"{path}:1: a file with unsafe code opens with its contract, in a `//!` comment")
    for crate in FORBID_UNSAFE:
        root = ROOT / "crates" / crate / "src/lib.rs"
        if root.exists() and "#![forbid(unsafe_code)]" not in root.read_text():
            found.append(f"crates/{crate}/src/lib.rs: `#![forbid(unsafe_code)]` is missing")
    return found


def no_registry_hosts() -> list[str]:
    """Return each line that names the host of a package registry: machines bring their own configuration."""
    found: list[str] = []
    for path in tracked_files():
        if path in MACHINE_WRITTEN:
            continue
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            found.append(
                f"{path}: not text; the repository holds no binaries (fixtures are made by their tests)"
            )
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found += [
                f"{path}:{number}: names the registry host {host}" for host in REGISTRIES if host in line
            ]
    return found


def long_files() -> list[str]:
    """Return the source files that want to be two."""
    found: list[str] = []
    for path in tracked_files():
        if path.suffix not in {".rs", ".py", ".c"}:
            continue
        count = (ROOT / path).read_text(errors="replace").count("\n")
        if count > LONG:
            found.append(f"{path}: {count} lines; past about {LONG} a file wants to be two")
    return found
