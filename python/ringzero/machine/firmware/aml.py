"""A small assembler for AML, the byte code of ACPI's DSDT (ACPI 6.5 chapter 20 AML Specification).

Every function returns bytes, so a definition block is written as nested calls:

    device("COM1", name("_HID", eisa_id("PNP0501")), name("_CRS", resources(io_ports(0x3F8, 8), irq(4))))

Only what our tables need. A name that AML does not allow is a ValueError: that would be our own mistake.
"""

from __future__ import annotations

import re
import struct
from typing import Final

__all__ = [
    "BUS_NUMBERS",
    "DWORD_ACCESS",
    "MEMORY",
    "SYSTEM_IO",
    "SYSTEM_MEMORY",
    "address_space",
    "bit_and",
    "buffer",
    "device",
    "eisa_id",
    "equal",
    "field",
    "integer",
    "interrupt",
    "io_ports",
    "irq",
    "local",
    "memory",
    "method",
    "name",
    "notify",
    "operation_region",
    "package",
    "path",
    "resources",
    "return_value",
    "scope",
    "store",
    "string",
    "when",
]

_ZERO_OP: Final = b"\x00"
_ONE_OP: Final = b"\x01"
_NAME_OP: Final = b"\x08"
_BYTE_PREFIX: Final = b"\x0a"
_WORD_PREFIX: Final = b"\x0b"
_DWORD_PREFIX: Final = b"\x0c"
_STRING_PREFIX: Final = b"\x0d"
_QWORD_PREFIX: Final = b"\x0e"
_SCOPE_OP: Final = b"\x10"
_BUFFER_OP: Final = b"\x11"
_PACKAGE_OP: Final = b"\x12"
_METHOD_OP: Final = b"\x14"
_DUAL_NAME_PREFIX: Final = b"\x2e"
_MULTI_NAME_PREFIX: Final = b"\x2f"
_LOCAL0_OP: Final = 0x60
_STORE_OP: Final = b"\x70"
_AND_OP: Final = b"\x7b"
_EQUAL_OP: Final = b"\x93"
_NOTIFY_OP: Final = b"\x86"
_IF_OP: Final = b"\xa0"
_RETURN_OP: Final = b"\xa4"
_REGION_OP: Final = b"\x5b\x80"
_FIELD_OP: Final = b"\x5b\x81"
_DEVICE_OP: Final = b"\x5b\x82"

SYSTEM_MEMORY: Final = 0
SYSTEM_IO: Final = 1
"""The address space of an operation region: physical addresses, or I/O ports."""
DWORD_ACCESS: Final = 3
"""How a field is accessed: 32 bits at a time."""

MEMORY: Final = 0
BUS_NUMBERS: Final = 2
"""Resource types of address space descriptors (6.4.3.5.1)."""

_SEGMENT: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,3}\Z")


def integer(value: int) -> bytes:
    """Return the shortest constant for 0 <= value < 2**64 (20.2.3 Data Objects Encoding)."""
    if value == 0:
        return _ZERO_OP
    if value == 1:
        return _ONE_OP
    if value < 1 << 8:
        return _BYTE_PREFIX + struct.pack("<B", value)
    if value < 1 << 16:
        return _WORD_PREFIX + struct.pack("<H", value)
    if value < 1 << 32:
        return _DWORD_PREFIX + struct.pack("<I", value)
    return _QWORD_PREFIX + struct.pack("<Q", value)


def string(value: str) -> bytes:
    """Return a string constant: ASCII, no null character."""
    if "\0" in value:
        raise ValueError(f"no null character in an AML string: {value!r}")
    return _STRING_PREFIX + value.encode("ascii") + b"\0"


def _name_string(path: str) -> bytes:
    r"""Return a path such as `COM1`, `\_SB` or `\_SB.PCI0` (20.2.2 Name Objects Encoding)."""
    root = b"\\" if path.startswith("\\") else b""
    segments = path.removeprefix("\\").split(".")
    if not all(_SEGMENT.match(segment) for segment in segments):
        raise ValueError(f"not an AML name: {path!r}")
    encoded = b"".join(segment.ljust(4, "_").encode("ascii") for segment in segments)
    if len(segments) == 1:
        return root + encoded
    if len(segments) == 2:
        return root + _DUAL_NAME_PREFIX + encoded
    return root + _MULTI_NAME_PREFIX + bytes([len(segments)]) + encoded


def _with_length(body: bytes) -> bytes:
    """Return `body` behind its PkgLength, which counts itself (20.2.4 Package Length Encoding)."""
    if len(body) + 1 < 1 << 6:
        return bytes([len(body) + 1]) + body
    for extra in (1, 2, 3):
        length = len(body) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            lead = extra << 6 | length & 0xF
            return bytes([lead]) + (length >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"an AML package of {len(body)} bytes is too long")


def name(path: str, value: bytes) -> bytes:
    """Return `Name (path, value)`."""
    return _NAME_OP + _name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Return `Scope (path) { terms }`."""
    return _SCOPE_OP + _with_length(_name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Return `Device (path) { terms }`."""
    return _DEVICE_OP + _with_length(_name_string(path) + b"".join(terms))


def method(path: str, *terms: bytes, arguments: int = 0) -> bytes:
    """Return `Method (path, arguments, NotSerialized) { terms }`."""
    return _METHOD_OP + _with_length(_name_string(path) + bytes([arguments & 7]) + b"".join(terms))


def return_value(value: bytes) -> bytes:
    """Return `Return (value)`."""
    return _RETURN_OP + value


def path(text: str) -> bytes:
    """Return a named object, as a value or as the target of a store."""
    return _name_string(text)


def local(number: int) -> bytes:
    """Return `LocalN`, a variable of the method: 0 to 7."""
    return bytes([_LOCAL0_OP + (number & 7)])


def store(value: bytes, target: bytes) -> bytes:
    """Return `target = value`."""
    return _STORE_OP + value + target


def bit_and(left: bytes, right: bytes) -> bytes:
    """Return `left & right`, which is kept nowhere."""
    return _AND_OP + left + right + _ZERO_OP


def equal(left: bytes, right: bytes) -> bytes:
    """Return `left == right`."""
    return _EQUAL_OP + left + right


def when(condition: bytes, *terms: bytes) -> bytes:
    """Return `If (condition) { terms }`."""
    return _IF_OP + _with_length(condition + b"".join(terms))


def notify(path: str, value: bytes) -> bytes:
    """Return `Notify (path, value)`."""
    return _NOTIFY_OP + _name_string(path) + value


def operation_region(path: str, space: int, first: int, size: int) -> bytes:
    """Return `OperationRegion (path, space, first, size)`: registers, `size` bytes of them."""
    return _REGION_OP + _name_string(path) + bytes([space]) + integer(first) + integer(size)


def field(region: str, access: int, *units: tuple[str, int]) -> bytes:
    """Return `Field (region, access, NoLock, WriteAsZeros)`; each unit has a name and a width in bits."""
    write_as_zeros = 2 << 5
    body = _name_string(region) + bytes([access | write_as_zeros])
    for unit, bits in units:
        # 20.2.4: the width is written as a package's length is, which does not count itself here.
        body += _name_string(unit) + (
            bytes([bits]) if bits < 1 << 6 else bytes([1 << 6 | bits & 0xF, bits >> 4])
        )
    return _FIELD_OP + _with_length(body)


def package(*elements: bytes) -> bytes:
    """Return `Package () { elements }`."""
    return _PACKAGE_OP + _with_length(bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Return `Buffer () { data }`."""
    return _BUFFER_OP + _with_length(integer(len(data)) + data)


def eisa_id(text: str) -> bytes:
    """Return `EisaId ("PNP0501")`: three letters of 5 bits, four hexadecimal digits, most significant byte first."""
    if not re.fullmatch(r"[A-Z]{3}[0-9A-F]{4}", text):
        raise ValueError(f"not an EISA id: {text!r}")
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    (value,) = struct.unpack("<I", struct.pack(">HH", letters, int(text[3:], 16)))
    return _DWORD_PREFIX + struct.pack("<I", value)


def io_ports(first: int, count: int, *, alignment: int = 1) -> bytes:
    """Return a descriptor of `count` fixed I/O ports (6.4.2.5 I/O Port Descriptor, 16-bit decode)."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, alignment, count)


def irq(line: int) -> bytes:
    """Return a descriptor of one ISA interrupt, edge-triggered, active high (6.4.2.1 IRQ Descriptor, two
    bytes).
    """
    return struct.pack("<BH", 0x22, 1 << line)


def interrupt(line: int) -> bytes:
    """Return a descriptor of one interrupt that several devices share: a level, active low as those of the PCI bus are
    (6.4.3.6 Extended Interrupt Descriptor).
    """
    consumer, active_low, shared = 1 << 0, 1 << 2, 1 << 3
    return struct.pack("<BHBBI", 0x89, 6, consumer | active_low | shared, 1, line)


def memory(first: int, size: int) -> bytes:
    """Return a descriptor of a fixed range of 32-bit addresses, read and written (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, first, size)


def address_space(kind: int, first: int, size: int, *, flags: int = 0) -> bytes:
    """Return a descriptor of a range that a bridge passes on, fixed at both ends (6.4.3.5.2 DWord and 6.4.3.5.3
    Word Address Space Descriptor); kind: 0 memory, 2 bus numbers.

    Bus numbers take 16 bits, memory 32. `flags` are the type's own: for memory 1 is read-write.
    """
    fixed = 0b1100  # _MIF, _MAF: both ends; positive decoding, consumed by the bridge's children
    tag, layout = (0x88, "<BHBBBHHHHH") if kind == BUS_NUMBERS else (0x87, "<BHBBBIIIII")
    length = struct.calcsize(layout) - 3
    return struct.pack(layout, tag, length, kind, fixed, flags, 0, first, first + size - 1, 0, size)


def resources(*descriptors: bytes) -> bytes:
    """Return the buffer for `_CRS`: descriptors and the end tag, whose checksum of 0 means "not used"."""
    return buffer(b"".join(descriptors) + b"\x79\x00")
