"""A host with many guests: a daemon, a process a VM, and the memory policy that they follow.

client       the Python API, `Host`
daemon       starts VMs and watches over them; `guest` is one VM as it sees it, `fork_link` its fork server
fork_server  has everything loaded that a VM needs, and becomes one
vm_process   one VM: guest, console, control socket; `vm_memory` is its memory
wire, loop   how these processes talk, and wait
runtime      the folder where they find each other; `state` is the database in it
arbiter      has the policy decide over the memory of all VMs; `vm_orders` is the other end, in a VM's process
memory       a policy's counters, from what VMs tell (`guest_counters`) and /proc says (`facts`)
sharing      joins VMs to the sharer (`sharer`, and `sharer_link` to it)
switching    plugs VMs into the switch (`switch`; `switches` finds it, or starts it)
rows         what the daemon tells of VMs; `metrics` and `map` show it
policy       the protocol of a memory policy, our own one, and one that a user's file gives
trace        recorded counters, as JSON lines
simulate     what would have been, had a policy decided over a trace; `picture` draws it
"""
