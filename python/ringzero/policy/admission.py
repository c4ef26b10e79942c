"""May one more VM start: Waldspurger, OSDI 2002, 6.2 "Admission Control".

Two sums must hold. What is promised must be there: every min, every monitor's own memory, and what is kept free.
And nothing may be lost: every page that a guest can fill needs a place, in memory or in the swap file, even
if no guest gives a page back by itself. (The paper reserves size - min in the swap file for every VM; only
what memory cannot hold is asked for here, so that a host that promises no more than it has needs no swap.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringzero.policy.counters import PAGE, HostMemory, VmMemory, amount
from ringzero.policy.parameters import Parameters

__all__ = ["Admission", "admit"]

MIB = (1 << 20) // PAGE
"""Pages."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer, and one sentence that shows the sum."""

    admitted: bool
    reason: str


def admit(
    host: HostMemory, vms: Sequence[VmMemory], newcomer: VmMemory, parameters: Parameters | None = None
) -> Admission:
    """Say whether `newcomer` may start beside `vms`."""
    p = parameters or Parameters()
    if any(vm.name == newcomer.name for vm in vms):
        return Admission(False, f"vm {newcomer.name!r} is refused: there is a vm of that name already")
    reserve = p.reserve(host.total)
    overhead = sum(vm.overhead for vm in vms) + newcomer.overhead
    common = f"{amount(overhead)} of the monitors' own and {amount(reserve)} kept free"

    mins = sum(vm.min for vm in vms)
    promised = mins + newcomer.min + overhead + reserve
    excess = promised - host.total
    if excess > 0:
        rest = newcomer.min - excess
        # Rounded so that who follows the advice is not refused again.
        way_out = (
            f"give it a min of at most {amount(rest // MIB * MIB)}" if rest >= MIB else "lower other mins"
        )
        return Admission(
            False,
            f"vm {newcomer.name!r} is refused: its min of {amount(newcomer.min)}, the mins of {_vms(vms)}"
            f" ({amount(mins)}), {common} make {amount(promised)}, which is {amount(excess)} more than the host"
            f" has ({amount(host.total)}): {way_out}, or stop a vm",
        )

    sizes = sum(vm.size for vm in vms)
    places = host.total + host.swap_size
    excess = sizes + newcomer.size + overhead + reserve - places
    if excess > 0:
        return Admission(
            False,
            f"vm {newcomer.name!r} is refused: its size of {amount(newcomer.size)}, the sizes of {_vms(vms)}"
            f" ({amount(sizes)}), {common} make {amount(places + excess)}, which is {amount(excess)} more than"
            f" memory ({amount(host.total)}) and swap file ({amount(host.swap_size)}) can hold:"
            f" make the swap file {amount(-(-excess // MIB) * MIB)} larger, or stop a vm",
        )
    return Admission(
        True,
        f"vm {newcomer.name!r} is admitted: all mins, {common} make {amount(promised)}"
        f" of {amount(host.total)}",
    )


def _vms(vms: Sequence[VmMemory]) -> str:
    return "1 other vm" if len(vms) == 1 else f"{len(vms)} other vms"
