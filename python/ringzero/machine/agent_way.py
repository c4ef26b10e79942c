"""How a machine reaches its guest's agent: what is added to the machine, what the guest is told, and the lines."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from ringzero.errors import InputError
from ringzero.machine.agent_lines import VSOCK_PORT, AcceptedLines, AgentLines, Lines

if TYPE_CHECKING:
    from ringzero import _core
    from ringzero.machine.ports import Ports
    from ringzero.machine.vsock import Vsock

__all__ = ["AGENT_NAME", "AGENT_PORT", "AgentWay"]

AGENT_PORT = 1
"""The serial port that an agent begins on."""
AGENT_NAME = "org.ringzero.agent"
"""The virtio port that it goes on over: copies are tens of times as fast."""

_WORDS = {"auto": "ringzero.agent", "serial": "ringzero.agent", "port": "ringzero.agent=port"}
_WORDS["vsock"] = "ringzero.agent=vsock"


class AgentWay:
    """One of: "auto", over the serial port at first and then over the virtio port; "serial", "port", "vsock" over that
    alone.
    """

    def __init__(self, wanted: bool | str) -> None:
        """Take what `agent=` of a machine says; True is "auto", False none. Raises InputError for other words."""
        self._name = wanted if isinstance(wanted, str) else "auto" if wanted else ""
        if self._name and self._name not in _WORDS:
            raise InputError(f"agent={wanted!r}: say True, False, {', '.join(map(repr, _WORDS))}")

    def __bool__(self) -> bool:
        """Whether there shall be an agent."""
        return bool(self._name)

    @property
    def word(self) -> str:
        """What the guest's kernel command line says."""
        return _WORDS[self._name]

    @property
    def needs_port(self) -> bool:
        """Whether the machine has the virtio port."""
        return self._name in ("auto", "port")

    @property
    def needs_vsock(self) -> bool:
        """Whether the machine has a vsock."""
        return self._name == "vsock"

    def lines(self, vm: _core.Vm, ports: Ports, vsock: Vsock | None) -> Lines:
        """Return the lines of a machine that was put together, and has not started."""
        if self._name == "vsock" and vsock is not None:
            return AcceptedLines(vsock.listen(VSOCK_PORT))
        if self._name == "port":
            return AgentLines(ports.join(AGENT_NAME))

        def port() -> socket.socket:
            from ringzero.machine.machine import core_errors

            with core_errors():
                return ports.join(AGENT_NAME)

        serial = socket.socket(fileno=vm.serial_fd(AGENT_PORT))
        return AgentLines(serial, port if self._name == "auto" else None)
