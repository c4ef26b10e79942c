"""The registers with which a processor starts, in the names of `ringzero._core.Vm.set_registers`.

A segment's attributes are bytes 5 and 6 of its descriptor without the limit's four bits: type, S, DPL and P
in bits 0-7, AVL, L, D/B and G in bits 12-15 (Intel SDM (2024-12) Vol. 3A 3.4.5 Segment Descriptors).
"""

from __future__ import annotations

import functools
import struct
from typing import Final

from ringzero.machine import address_map

__all__ = ["PAGE_TABLES_SIZE", "gdt", "identity_page_tables", "long_mode", "protected_mode32"]

# Descriptors: present, ring 0, accessed; code is execute/read, data is read/write.
_CODE_32: Final = 0x00CF_9B00_0000_FFFF
_CODE_64: Final = 0x00AF_9B00_0000_FFFF
_DATA: Final = 0x00CF_9300_0000_FFFF

SELECTOR_CODE_32: Final = 0x08
SELECTOR_CODE_64: Final = 0x10
"""__BOOT_CS of the Linux boot protocol."""
SELECTOR_DATA: Final = 0x18
"""__BOOT_DS of the Linux boot protocol."""

_ATTRIBUTES_CODE_32: Final = 0xC09B
_ATTRIBUTES_CODE_64: Final = 0xA09B
_ATTRIBUTES_DATA: Final = 0xC093
_ATTRIBUTES_TSS_32_BUSY: Final = 0x008B
_ATTRIBUTES_LDT: Final = 0x0082
_FLAT: Final = 0xFFFF_FFFF

_CR0_PE: Final = 1 << 0
_CR0_MP: Final = 1 << 1
_CR0_ET: Final = 1 << 4
_CR0_NE: Final = 1 << 5
_CR0_WP: Final = 1 << 16
_CR0_PG: Final = 1 << 31
_CR4_PAE: Final = 1 << 5
_EFER_LME: Final = 1 << 8
_EFER_LMA: Final = 1 << 10
_RFLAGS_ALWAYS: Final = 1 << 1

_PTE_PRESENT: Final = 1 << 0
_PTE_WRITABLE: Final = 1 << 1
_PTE_LARGE: Final = 1 << 7
_LARGE_PAGE: Final = 2 << 20

PAGE_TABLES_SIZE: Final = 6 * address_map.PAGE


def gdt() -> bytes:
    """Return the table that both entry states use: null, 32-bit code, 64-bit code (0x10), data (0x18)."""
    return struct.pack("<4Q", 0, _CODE_32, _CODE_64, _DATA)


@functools.cache
def identity_page_tables(address: int) -> bytes:
    """Return page tables, to be put at `address`, that map the first 4 GiB to themselves with 2 MiB pages.

    Six pages: PML4, PDPT and four page directories (Intel SDM (2024-12) Vol. 3A 4.5 4-Level Paging). They map
    the APICs as well as RAM; caching attributes mean nothing to a guest of ours.
    """
    table = _PTE_PRESENT | _PTE_WRITABLE
    page = address_map.PAGE
    pml4 = [address + page | table, *[0] * 511]
    pdpt = [*(address + (2 + i) * page | table for i in range(4)), *[0] * 508]
    directories = [i * _LARGE_PAGE | table | _PTE_LARGE for i in range(4 * 512)]
    return struct.pack(f"<{6 * 512}Q", *pml4, *pdpt, *directories)


def _segments(code_selector: int, code_attributes: int) -> dict[str, int]:
    """Return flat segments: code in CS, data in the rest, an empty LDT and a TSS that no one uses."""
    values = {
        "cs": code_selector,
        "cs_base": 0,
        "cs_limit": _FLAT,
        "cs_attributes": code_attributes,
        "tr": 0,
        "tr_base": 0,
        "tr_limit": 0x67,
        "tr_attributes": _ATTRIBUTES_TSS_32_BUSY,
        "ldtr": 0,
        "ldtr_base": 0,
        "ldtr_limit": 0,
        "ldtr_attributes": _ATTRIBUTES_LDT,
        "gdtr_base": address_map.GDT,
        "gdtr_limit": len(gdt()) - 1,
        "idtr_base": 0,
        "idtr_limit": 0,
    }
    for name in ("ds", "es", "ss", "fs", "gs"):
        values |= {
            name: SELECTOR_DATA,
            f"{name}_base": 0,
            f"{name}_limit": _FLAT,
            f"{name}_attributes": _ATTRIBUTES_DATA,
        }
    return values


_GENERAL: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{i}" for i in range(8, 16)))


def long_mode(*, entry: int, cr3: int = address_map.PAGE_TABLES, **general: int) -> dict[str, int]:
    """Return the state of a processor in 64-bit mode at `entry`, paging on with the tables at `cr3`.

    This is what the Linux 64-bit boot protocol asks for (Documentation/arch/x86/boot.rst, "64-bit Boot
    Protocol"): __BOOT_CS and __BOOT_DS flat, interrupts off. `general` sets general registers, all others are
    zero.
    """
    return {
        **dict.fromkeys(_GENERAL, 0),
        "rsp": address_map.STACK_TOP,
        "rip": entry,
        "rflags": _RFLAGS_ALWAYS,
        "cr0": _CR0_PE | _CR0_MP | _CR0_ET | _CR0_NE | _CR0_WP | _CR0_PG,
        "cr2": 0,
        "cr3": cr3,
        "cr4": _CR4_PAE,
        "efer": _EFER_LME | _EFER_LMA,
        **_segments(SELECTOR_CODE_64, _ATTRIBUTES_CODE_64),
        **general,
    }


def protected_mode32(*, entry: int, **general: int) -> dict[str, int]:
    """Return the state of a processor in 32-bit protected mode at `entry`, without paging.

    This is the PVH start state (Xen docs/misc/pvh.pandoc): CR0.PE alone, flat 4 GiB segments, a 32-bit TSS in
    TR. `general` sets general registers (the protocol wants rbx = address of hvm_start_info), all others are
    zero.
    """
    return {
        **dict.fromkeys(_GENERAL, 0),
        "rsp": 0,
        "rip": entry,
        "rflags": _RFLAGS_ALWAYS,
        "cr0": _CR0_PE | _CR0_ET,
        "cr2": 0,
        "cr3": 0,
        "cr4": 0,
        "efer": 0,
        **_segments(SELECTOR_CODE_32, _ATTRIBUTES_CODE_32),
        **general,
    }
