"""How a kernel gets into memory and a processor to its first instruction.

`plan_boot` looks at the bytes of a kernel, picks the protocol, checks everything, and returns a `BootPlan`:
what is written where, and the registers of the first processor. Nothing here touches a virtual machine, so
that all of it can be tested without one; `BootPlan.load` then carries the plan out.
"""

from ringzero.machine.boot.files import read_file
from ringzero.machine.boot.plan import BootPlan, GuestMemory, Piece, plan_boot, unpacked_vmlinux

__all__ = ["BootPlan", "GuestMemory", "Piece", "plan_boot", "read_file", "unpacked_vmlinux"]
