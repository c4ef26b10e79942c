"""A replay as a PNG: what every VM held over time, one panel a policy, with how scarce memory was.

matplotlib draws it, which ringzero does not ask for otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ringzero.errors import InputError, UnsupportedError
from ringzero.host.simulate import Replay
from ringzero.policy import PAGE, Level

__all__ = ["draw"]

MOST = 12
"""VMs with a colour of their own; the smaller others are drawn as one."""
SHADES = {Level.SOFT: "#fff3c4", Level.HARD: "#ffd9b0", Level.LOW: "#ffb3ad"}
MIB = 1 << 20


def draw(replays: Sequence[Replay], file: Path) -> None:
    """Draw replays of one trace into `file`. Raises UnsupportedError without matplotlib, InputError if it cannot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "a picture needs matplotlib, which is not installed: pip install matplotlib"
        ) from error

    figure = Figure(figsize=(10, 3.2 * len(replays)), layout="constrained")
    panels = figure.subplots(len(replays), 1, sharex=True, sharey=True, squeeze=False)
    shown = _largest(replays)
    for panel, one in zip(panels[:, 0], replays, strict=True):
        at = [moment.at for moment in one.moments]
        held = {name: [_held(moment.vms.get(name)) for moment in one.moments] for name in one.names()}
        rows = [held.get(name, [0.0] * len(at)) for name in shown]
        others = [values for name, values in held.items() if name not in shown]
        labels = [_plain(name) for name in shown]
        if others:
            rows.append([sum(values) for values in zip(*others, strict=True)])
            labels.append(f"{len(others)} others")
        panel.stackplot(at, rows, labels=labels, step="post")
        for moment in one.moments:
            if moment.level in SHADES:
                panel.axvspan(moment.at, moment.at + moment.lasted, color=SHADES[moment.level], zorder=0)
        panel.set_title(_plain(f"policy {one.policy}"), loc="left")
        panel.set_ylabel("held, MiB")
    panels[-1, 0].set_xlabel("seconds (yellow, orange, red behind: soft, hard, low)")
    panels[0, 0].legend(loc="upper right", fontsize="small")
    try:
        figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"the picture {file} cannot be written: {error.strerror}") from error


def _largest(replays: Sequence[Replay]) -> list[str]:
    """Return the VMs that hold most, in the order in which they came."""
    names = list(dict.fromkeys(name for one in replays for name in one.names()))
    weight = {name: max(one.mean(name, "held") for one in replays if name in one.names()) for name in names}
    most = set(sorted(names, key=lambda name: -weight[name])[:MOST])
    return [name for name in names if name in most]


def _held(vm: object) -> float:
    return float(getattr(vm, "held", 0)) * PAGE / MIB


def _plain(name: str) -> str:
    """Return a name that matplotlib takes neither for a formula nor, by its first letter, for one to leave out."""
    return f"\u200b{name}".replace("$", r"\$")
