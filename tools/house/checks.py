"""`tools/dev check`: everything that can be said of the tree without running the program."""

from collections.abc import Callable, Sequence
from pathlib import Path

from house import cargo_rules, docs_paths, setup, source_rules
from house.shell import ROOT, VENV, Failed, say, status_of

Check = Callable[[], list[str]]
"""A check returns what is wrong, one sentence each; an empty list is a pass."""


def command(*words: str | Path, extra: dict[str, str] | None = None) -> Check:
    """Return a check that runs a command and fails when that does; the command prints its own findings."""

    def run() -> list[str]:
        status = status_of(words, extra=extra)
        return [] if status == 0 else [f"`{Path(words[0]).name} {words[1]}` ended with status {status}"]

    return run


def ruff(*words: str) -> Check:
    """Return a check by ruff over everything that is Python here, tools/dev included."""
    return command(VENV / "bin/ruff", *words)


CHECKS: dict[str, Check] = {
    "rustfmt": command("cargo", "fmt", "--all", "--", "--check", "-l"),
    "clippy": command(
        "cargo", "clippy", "--quiet", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"
    ),
    "ruff-format": ruff("format", "--check", "--quiet"),
    "ruff": ruff("check", "--quiet"),
    "mypy": command(VENV / "bin/mypy"),
    "stubtest": command(VENV / "bin/stubtest", "ringzero._core", extra={"MYPYPATH": str(ROOT / "python")}),
    "python-imports": command(VENV / "bin/lint-imports", "--no-cache"),
    "cargo-imports": cargo_rules.check,
    "unsafe": source_rules.unsafe_in_its_places,
    "docs": docs_paths.check,
    "hosts": source_rules.no_registry_hosts,
    "length": source_rules.long_files,
}

# These read the tree and need no virtual environment; of the others, only stubtest needs the built core.
ON_BARE_TREE = frozenset({"rustfmt", "clippy", "cargo-imports", "unsafe", "docs", "hosts", "length"})
# What these find is a wish, not a rule.
WARN_ONLY = frozenset({"length"})


def check(only: Sequence[str] = ()) -> int:
    """Run the checks, all of them to the end, and return 0 if none failed."""
    unknown = sorted(set(only) - set(CHECKS))
    if unknown:
        raise Failed(f"no such check: {', '.join(unknown)}; known: {', '.join(CHECKS)}", 2)
    chosen = [name for name in CHECKS if not only or name in only]
    setup.system()
    if not set(chosen) <= ON_BARE_TREE:
        setup.environment_ready()
    if "stubtest" in chosen:
        setup.prepare()
    failed: list[str] = []
    for name in chosen:
        say(f"check {name}")
        findings = CHECKS[name]()
        for finding in findings:
            print(f"   {'warning: ' if name in WARN_ONLY else ''}{finding}", flush=True)
        if findings and name not in WARN_ONLY:
            failed.append(name)
    say(f"checks failed: {', '.join(failed)}" if failed else f"{len(chosen)} checks passed")
    return 1 if failed else 0
