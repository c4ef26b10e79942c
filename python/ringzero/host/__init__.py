"""A host with many guests: so far, which memory policy it follows and how two of them compare.

policy       the protocol of a memory policy, our own one, and one that a user's file gives
trace        recorded counters, as JSON lines
simulate     what would have been, had a policy decided over a trace
picture      the same as a PNG
"""
