"""Slow devices in Python, and the protocol for devices of your own.

    class Dice:
        name = "dice"
        ports = (PortRange(0x5000, 1),)

        def read(self, port: int, size: int) -> int:
            return random.randint(1, 6)

        def write(self, port: int, size: int, value: int) -> None:
            pass

A device is called from one dispatcher thread a machine, never from two at once, and never on the path of a
queue, a timer or a page fault. What it needs of the world (the time, an interrupt line, the end of the
machine) is given to it as plain callables, so that it can be tested with nothing around it.
"""

from ringzero.devices.debug_exit import DebugExit
from ringzero.devices.debug_port import DebugPort
from ringzero.devices.device import Device, PortBus, PortRange, attach
from ringzero.devices.i8042 import I8042
from ringzero.devices.named import NAMES, check_names, named
from ringzero.devices.pc_testdev import PcTestdev
from ringzero.devices.pvpanic import PvPanic
from ringzero.devices.rtc import Rtc

__all__ = [
    "I8042",
    "NAMES",
    "DebugExit",
    "DebugPort",
    "Device",
    "PcTestdev",
    "PortBus",
    "PortRange",
    "PvPanic",
    "Rtc",
    "attach",
    "check_names",
    "named",
]
