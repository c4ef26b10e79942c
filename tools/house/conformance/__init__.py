"""`tools/dev conformance`: other projects' tests of an x86 processor, on each engine and under QEMU's TCG.

The tests are not ours and not in the tree: the developer names a checkout that he has built.
"""
