"""The keyboard controller, with no keyboard and no mouse: enough to be probed quickly, and to reset the
machine.

What Linux does with it (6.12, drivers/input/serio/i8042.c): `i8042_controller_check` empties the output
buffer; `i8042_controller_selftest` wants 0x55 to command 0xAA; `i8042_controller_init` reads and writes the
command byte; `i8042_check_aux` writes a byte through the mouse port with 0xD3 and then asks 0xA9 whether
there is one. A command that is never answered costs half a second, so every command here is answered at once.
To the mouse questions the answer is "no". A byte for the keyboard comes back as 0xFE with the time-out bit,
as a real controller does when nobody is there, and the driver gives up without waiting.

Command 0xFE pulses the processor's reset line: that is how PCs have rebooted since 1984.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from ringzero.devices import ports as pc
from ringzero.devices.device import PortRange

__all__ = ["I8042"]

_OUTPUT_FULL: Final = 0x01
_SYSTEM: Final = 0x04
_NOT_LOCKED: Final = 0x10
_FROM_MOUSE: Final = 0x20
_TIMED_OUT: Final = 0x40

_COMMAND_BYTE_IRQ: Final = 0x01
_COMMAND_BYTE_RESET: Final = 0x30
"""After the self-test: both ports disabled, no interrupts."""

_SELF_TEST_PASSED: Final = 0x55
_NO_DEVICE: Final = 0xFE
_CLOCK_STUCK_LOW: Final = 0x01
_OUTPUT_PORT: Final = 0x03
"""Reset line high (not resetting) and A20 on."""


class I8042:
    """Ports 0x60 and 0x64.

    `request_end` is called with "reboot" when the guest pulses the reset line; `set_irq`, when given, drives
    the keyboard's interrupt line.
    """

    name = "i8042"
    ports = (PortRange(pc.KEYBOARD_DATA), PortRange(pc.KEYBOARD_COMMAND))

    def __init__(
        self,
        request_end: Callable[[str], object],
        set_irq: Callable[[int, bool], object] | None = None,
    ) -> None:
        self._request_end = request_end
        self._set_irq = set_irq
        self._answers: deque[tuple[int, int]] = deque(maxlen=16)  # (status bits, byte)
        self._ram = bytearray(32)  # byte 0 is the command byte
        self._ram[0] = _SYSTEM
        self._passed_test = True
        self._last = 0
        self._waiting_for: int | None = None  # the command whose data byte comes next

    def read(self, port: int, size: int) -> int:
        """Return status (0x64) or the next answer (0x60)."""
        del size
        if port == pc.KEYBOARD_COMMAND:
            status = _NOT_LOCKED | (_SYSTEM if self._passed_test else 0)
            if self._answers:
                status |= _OUTPUT_FULL | self._answers[0][0]
            return status
        if self._answers:
            _, self._last = self._answers.popleft()
            self._update_irq()
        return self._last

    def write(self, port: int, size: int, value: int) -> None:
        """Take a command (0x64) or a data byte (0x60)."""
        del size
        value &= 0xFF
        if port == pc.KEYBOARD_COMMAND:
            self._command(value)
        elif self._waiting_for is not None:
            command, self._waiting_for = self._waiting_for, None
            self._data(command, value)
        else:
            self._answer(_NO_DEVICE, _TIMED_OUT)  # a byte for the keyboard

    def _answer(self, byte: int, status: int = 0) -> None:
        self._answers.append((status, byte))
        self._update_irq()

    def _update_irq(self) -> None:
        """Drive IRQ 1 while a byte waits that did not come through the mouse port. Lines are edge-triggered
        on ISA.
        """
        if self._set_irq is None or not self._ram[0] & _COMMAND_BYTE_IRQ:
            return
        self._set_irq(pc.KEYBOARD_IRQ, False)
        if self._answers and not self._answers[0][0] & _FROM_MOUSE:
            self._set_irq(pc.KEYBOARD_IRQ, True)

    def _command(self, command: int) -> None:
        self._waiting_for = None
        if 0x20 <= command <= 0x3F:
            self._answer(self._ram[command & 0x1F])
        elif 0x60 <= command <= 0x7F or command in (0xD1, 0xD2, 0xD3, 0xD4):
            self._waiting_for = command
        elif command == 0xAA:
            self._answers.clear()
            self._ram[0] = _COMMAND_BYTE_RESET | _SYSTEM
            self._passed_test = True
            self._answer(_SELF_TEST_PASSED)
        elif command in (0xA9, 0xAB):
            # No mouse: its clock line does not move. The keyboard's own port is fine (0).
            self._answer(_CLOCK_STUCK_LOW if command == 0xA9 else 0)
        elif command == 0xA7:
            self._ram[0] |= 0x20
        elif command == 0xA8:
            self._ram[0] &= ~0x20
        elif command == 0xAD:
            self._ram[0] |= 0x10
        elif command == 0xAE:
            self._ram[0] &= ~0x10
        elif command == 0xC0:
            self._answer(0x80)  # input port: keyboard not locked
        elif command == 0xD0:
            self._answer(_OUTPUT_PORT)
        elif command & 0xF0 == 0xF0 and not command & 0x01:
            # 0xF0-0xFF pulse the output lines whose bits are clear; line 0 is the processor's reset.
            self._request_end("reboot")

    def _data(self, command: int, value: int) -> None:
        if 0x60 <= command <= 0x7F:
            self._ram[command & 0x1F] = value
            if command == 0x60:
                self._update_irq()
        elif command == 0xD1:
            if not value & 0x01:  # output port with the reset line low
                self._request_end("reboot")
        elif command == 0xD2:
            self._answer(value)
        elif command == 0xD3:
            self._answer(value ^ 0xFF)  # no loop through a mouse port that is not there
        else:
            self._answer(_NO_DEVICE, _TIMED_OUT | _FROM_MOUSE)
