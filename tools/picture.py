"""Makes docs/picture.svg from a real session: `.venv/bin/python tools/picture.py`.

Starts the default guest on a terminal of its own, types a few commands at its prompt, and draws what appeared.
"""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
TYPED = (
    "uname -a",
    "id",
    "grep -m1 'model name' /proc/cpuinfo",
    "dmesg | grep -m2 -i hypervisor",
    "poweroff",
)
# What a shell's line editor says to a terminal and not to a reader: cursor questions, erasures; bells.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-ln-z]|\x07|\r(?=\n)")
PROMPT = re.compile(r"[#$] $")


def session() -> str:
    """Return what a session printed, from the command line that starts it to the power-off."""
    ours, theirs = pty.openpty()
    command = [str(ROOT / ".venv/bin/ringzero"), "run", "debian"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    waiting = list(TYPED)
    seen = ""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.5)[0]:
            try:
                seen += CONTROL.sub("", os.read(ours, 65536).decode(errors="replace"))
            except OSError:  # the guest is off and the terminal closed
                break
        elif waiting and PROMPT.search(seen):
            os.write(ours, waiting.pop(0).encode() + b"\n")
        elif process.poll() is not None:
            break
    os.close(ours)
    status = process.wait(10)
    return f"$ ringzero run debian\n{seen.rstrip()}\n$ echo $?\n{status}\n"


def main() -> int:
    """Draw the session into docs/picture.svg."""
    text = session()
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(Text.from_ansi(text))
    target = ROOT / "docs/picture.svg"
    drawn = console.export_svg(title="ringzero: an unmodified kernel in an ordinary process")
    # The reader's own fixed-width font will do; nobody's server needs to know who looks at it.
    target.write_text(re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
