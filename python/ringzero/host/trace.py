"""Counter traces, which are recorded counters: one instant of a host and all its VMs a line, as JSON.

    {"at": 30.0, "host": {"total": 98304, "free": 5000, ...}, "vms": [{"name": "web", "size": 65536, ...}, ...]}

`at` is in seconds from any beginning, and rises. The other names are the fields of `HostMemory` and `VmMemory`,
amounts in pages of 4 KiB; a field that has a default may be left out. Instead of `active` a VM may have the
counts of its sampler, `touched` and `sampled` of the period that ended then: a replay makes the averages of them
itself. VMs may come and go between lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ringzero.errors import InputError
from ringzero.policy import HostMemory, VmMemory

__all__ = ["Instant", "line", "read"]

LONGEST = 16 << 20
"""Bytes a line: room for tens of thousands of VMs."""


@dataclass(frozen=True, slots=True)
class Instant:
    """What was recorded at one time."""

    at: float
    """Seconds."""
    host: HostMemory
    vms: tuple[VmMemory, ...]
    samples: dict[str, tuple[int, int]]
    """By name of the VM: pages touched of pages sampled, where the trace has them instead of `active`."""


def line(at: float, host: HostMemory, vms: Sequence[VmMemory]) -> str:
    """Return the line, with its end, that records an instant."""
    record = {"at": at, "host": asdict(host), "vms": [asdict(vm) for vm in vms]}
    return json.dumps(record, separators=(",", ":")) + "\n"


def read(path: Path) -> list[Instant]:
    """Read a trace. Raises InputError, with the line, for what cannot be."""
    if not path.is_file():
        raise InputError(f"there is no trace {path}: give a file of JSON lines (docs/memory-policy.md)")
    found: list[Instant] = []
    for number, text in _lines(path):
        try:
            instant = _instant(json.loads(text))
            if found and instant.at <= found[-1].at:
                raise ValueError(
                    f"at is {instant.at}, and was {found[-1].at} on the line before: it must rise"
                )
        except (ValueError, RecursionError) as error:
            what = f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else error
            raise InputError(f"trace {path}, line {number}: {what}") from error
        found.append(instant)
    if len(found) < 2:
        raise InputError(f"trace {path} has {len(found)} instants, and a replay needs at least 2")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            number = 0
            while text := file.readline(LONGEST):
                number += 1
                if len(text) == LONGEST:
                    raise InputError(f"trace {path}, line {number}: longer than {LONGEST >> 20} MiB")
                if text.strip():
                    yield number, text
    except OSError as error:
        raise InputError(f"trace {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"trace {path} is not text: give a file of JSON lines") from error


def _instant(record: Any) -> Instant:
    if not isinstance(record, dict) or not {"at", "host", "vms"} <= record.keys():
        raise ValueError('a line has "at", "host" and "vms"')
    at = record["at"]
    if isinstance(at, bool) or not isinstance(at, int | float) or not abs(at) < 1e15:
        raise ValueError(f"at is {at!r:.40}, and must be seconds")
    if not isinstance(record["vms"], list):
        raise ValueError(f"vms is {record['vms']!r:.40}, and must be a list")
    vms: list[VmMemory] = []
    samples: dict[str, tuple[int, int]] = {}
    for values in record["vms"]:
        counts = _take_samples(values)
        vm: VmMemory = _counters(VmMemory, values, "a vm")
        vms.append(vm)
        if counts is not None:
            samples[vm.name] = counts
    if len({vm.name for vm in vms}) != len(vms):
        raise ValueError("two vms have the same name")
    return Instant(float(at), _counters(HostMemory, record["host"], "the host"), tuple(vms), samples)


def _take_samples(values: Any) -> tuple[int, int] | None:
    """Take `touched` and `sampled` out of a VM's values, if they are there."""
    if not isinstance(values, dict) or not {"touched", "sampled"} & values.keys():
        return None
    touched, sampled = values.pop("touched", None), values.pop("sampled", None)
    if type(touched) is not int or type(sampled) is not int or not 0 <= touched <= sampled or sampled == 0:
        raise ValueError(f"touched {touched!r:.40} of sampled {sampled!r:.40} pages cannot be")
    return touched, sampled


def _counters(kind: Any, values: Any, what: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{what} is {values!r:.40}, and must be an object")
    known = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if unknown := values.keys() - known:
        raise ValueError(f"{what} has {min(unknown)!r:.40}; known are {', '.join(sorted(known))}")
    if missing := needed - values.keys():
        raise ValueError(f"{what} has no {min(missing)!r}")
    return kind(**values)
