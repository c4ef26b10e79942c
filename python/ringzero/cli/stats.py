"""What `--stats` prints: the core's counters, and the rates that follow from them."""

from __future__ import annotations

import os


def show_stats(counters: dict[str, int]) -> None:
    """Print counters and rates on standard error, grouped by the first part of their names."""
    os.write(2, format_stats(counters).encode())


def format_stats(counters: dict[str, int]) -> str:
    """Return the counters as lines of text: dotted name, value; then hit rates in percent."""
    lines = ["--- ringzero statistics"]
    rows = [(name, _value(name, count)) for name, count in sorted(counters.items())]
    rows += rates(counters)
    width = max((len(name) for name, _ in rows), default=0)
    group = None
    for name, value in rows:
        head = name.partition(".")[0]
        if group is not None and head != group:
            lines.append("")
        group = head
        lines.append(f"{name:<{width}}  {value:>20}")
    return "\n".join(lines) + "\n"


def rates(counters: dict[str, int]) -> list[tuple[str, str]]:
    """Derive a hit rate from every pair of counters NAME.hits (or .probes, .lookups) and NAME.misses."""
    found = []
    for name, misses in sorted(counters.items()):
        base, _, last = name.rpartition(".")
        if last != "misses":
            continue
        hits = counters.get(f"{base}.hits")
        total = counters.get(f"{base}.probes", counters.get(f"{base}.lookups"))
        total = hits + misses if hits is not None else total
        if total:
            found.append((f"{base}.hit_rate", f"{100 * (total - misses) / total:.3f} %"))
    return found


def _value(name: str, count: int) -> str:
    if name.endswith(("_ns", ".ns")):
        return f"{count / 1e6:,.3f} ms"
    return f"{count:,}"
