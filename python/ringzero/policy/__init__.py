"""What a host with many guests decides: pure functions, counters in, decisions out.

Nothing here touches a VM, a file or a clock, and nothing here imports anything of ours: so a policy can be
tested on every case, and replayed over counters that were recorded elsewhere (`ringzero.host.simulate`). The
mechanisms that carry a decision out are in Rust. The equations are in docs/memory-policy.md.

    counters     what each VM and the host report, and what a VM is charged for
    activity     the share of its memory that a VM uses, from samples
    division     memory divided by shares, with the tax on idle pages
    level        how scarce memory is, without flapping
    admission    may one more VM start
    decide       all of it together: a target, and what to take by which means, for every VM
    parameters   every figure that can be turned, with its reason
"""

from ringzero.policy.activity import Activity
from ringzero.policy.admission import Admission, admit
from ringzero.policy.counters import PAGE, HostMemory, VmMemory, amount, charges
from ringzero.policy.decide import Decision, VmDecision, decide, entitlements, fault_of
from ringzero.policy.division import Claim, adjusted_ratio, divide
from ringzero.policy.level import Level, next_level
from ringzero.policy.parameters import Parameters

__all__ = [
    "PAGE",
    "Activity",
    "Admission",
    "Claim",
    "Decision",
    "HostMemory",
    "Level",
    "Parameters",
    "VmDecision",
    "VmMemory",
    "adjusted_ratio",
    "admit",
    "amount",
    "charges",
    "decide",
    "divide",
    "entitlements",
    "fault_of",
    "next_level",
]
