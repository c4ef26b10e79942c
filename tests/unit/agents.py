"""The guest's agent as a process of this host: a static program of Linux that serves whatever line it is given."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringzero.images.initramfs import agent_path
from ringzero.machine.drive import Driven
from ringzero.machine.exec import AgentLink


class Here(Driven):
    """What a machine is, with this host in the place of its guest."""

    def __init__(self, link: AgentLink) -> None:
        self.link = link

    def agent_link(self) -> AgentLink:
        assert self.link.wait_ready(20)
        return self.link


@contextmanager
def agent_here(program: Path | None = None) -> Iterator[Here]:
    ours, theirs = socket.socketpair()
    command = [str(program or agent_path()), "--fd", str(theirs.fileno())]
    agent = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    link = AgentLink(ours)
    try:
        yield Here(link)
    finally:
        link.close()  # the end of its line is the agent's own
        assert agent.wait(20) == 0
