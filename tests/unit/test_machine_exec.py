"""The link to the guest's agent, against an agent played by the test."""

import re
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from ringzero.errors import GuestEnded, GuestError, InputError
from ringzero.machine import frames, guest_process
from ringzero.machine.agent_lines import AgentLines
from ringzero.machine.exec import AgentLink
from ringzero.machine.frames import (
    ACK,
    CREDIT,
    EXEC,
    EXIT,
    FAILED,
    FAILED_DIRECTORY,
    HEADER,
    HELLO,
    LINE_WINDOW,
    MAGIC,
    MOVE,
    MOVED,
    OFFER,
    OUTPUT_LEFT,
    OUTPUT_MAX,
    OUTPUT_WINDOW,
    READY,
    SIGNAL,
    STDERR,
    STDIN,
    STDIN_EOF,
    STDIN_WINDOW,
    STDOUT,
    TAKEN,
    WORD,
    pack_exec,
)
from ringzero.machine.popen import run
from ringzero.machine.streams import OutputPipe

FRAME_H = Path(__file__).parents[2] / "guests" / "agent" / "frame.h"


class Agent:
    """The guest's end of the line."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.line.settimeout(20)

    def ready(self, number: int = 1234) -> None:
        self.send(READY, 0, MAGIC + WORD.pack(number))
        self.hello = HEADER.pack(HELLO, 0, 0, len(MAGIC) + 4) + MAGIC + WORD.pack(number)
        assert self.exactly(len(self.hello)) == self.hello
        self.send(ACK, 0, WORD.pack(len(self.hello)))

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        self.line.sendall(HEADER.pack(kind, 0, number, len(payload)) + payload)

    def take(self) -> tuple[int, int, int, bytes]:
        kind, flags, number, size = HEADER.unpack(self.exactly(HEADER.size))
        payload = self.exactly(size)
        self.send(ACK, 0, WORD.pack(HEADER.size + size))
        return kind, flags, number, payload

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.line.recv(size - len(data))
            assert piece, "the host closed the line"
            data += piece
        return data


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    link = AgentLink(ours)
    agent = Agent(theirs)
    yield link, agent
    theirs.close()
    link.close()


def test_the_numbers_are_those_of_frame_h() -> None:
    text = FRAME_H.read_text()
    numbers = {name: int(value, 0) for name, value in re.findall(r"\b([A-Z_]+) = (0x[0-9a-f]+|\d+),", text)}
    ours = {
        "FRAME_MAX": frames.FRAME_MAX,
        "OUTPUT_MAX": frames.OUTPUT_MAX,
        "OUTPUT_WINDOW": frames.OUTPUT_WINDOW,
        "OUTPUT_LEFT": frames.OUTPUT_LEFT,
        "LINE_WINDOW": frames.LINE_WINDOW,
        "STDIN_WINDOW": frames.STDIN_WINDOW,
        "CONSOLE_ID": frames.CONSOLE_ID,
        "FRAME_HEADER": HEADER.size,
    }
    for name in vars(frames):
        if name.startswith(("FLAG_", "FAILED_")):
            ours[name] = getattr(frames, name)
    for name in (
        "EXEC",
        "STDIN",
        "STDIN_EOF",
        "RESIZE",
        "SIGNAL",
        "POWEROFF",
        "REBOOT",
        "TAKEN",
        "CLOSE",
        "HELLO",
        "MOVE",
    ):
        ours[f"FRAME_{name}"] = getattr(frames, name)
    for name in ("READY", "STDOUT", "STDERR", "EXIT", "FAILED", "CREDIT", "ACK", "STARTED", "OFFER", "MOVED"):
        ours[f"FRAME_{name}"] = getattr(frames, name)
    assert numbers == ours
    assert '"' + MAGIC.decode().replace("\n", "\\n") + '"' in text


def test_ready_is_found_behind_other_words(pair) -> None:
    link, agent = pair
    assert not link.wait_ready(0)
    agent.line.sendall(b"SeaBIOS or whatever\r\n" + bytes(5000))
    agent.ready()
    assert link.wait_ready(20)


def test_a_command_from_start_to_end(pair) -> None:
    link, agent = pair
    agent.ready()
    out: list[bytes] = []
    err: list[bytes] = []
    how = {"env": {"A": "b"}, "cwd": "/tmp"}
    process = link.start(["echo", "x"], stdout=out.append, stderr=err.append, **how)
    kind, flags, number, payload = agent.take()
    assert (kind, flags) == (EXEC, 0)
    assert payload == struct.pack("<HHHH", 2, 1, 0, 0) + b"/tmp\0echo\0x\0A=b\0"
    agent.send(STDOUT, number, b"one")
    agent.send(STDERR, number, b"two")
    agent.send(STDOUT, number, b"three")
    agent.send(EXIT, number, WORD.pack(7 << 8))
    assert process.wait(20) == 7
    assert (out, err) == ([b"one", b"three"], [b"two"])


def test_the_end_by_a_signal(pair) -> None:
    link, agent = pair
    agent.ready()
    process = link.start(["x"])
    number = agent.take()[2]
    process.send_signal(15)
    assert agent.take() == (SIGNAL, 0, number, WORD.pack(15))
    agent.send(EXIT, number, WORD.pack(15))
    assert process.wait(20) == -15


def test_a_command_that_is_not_there(pair) -> None:
    link, agent = pair
    agent.ready()
    process = link.start(["nonesuch"], cwd="/nowhere")
    agent.send(FAILED, agent.take()[2], WORD.pack(2))
    with pytest.raises(FileNotFoundError) as caught:
        process.wait(20)
    assert caught.value.filename == "nonesuch"
    process = link.start(["true"], cwd="/nowhere")
    agent.send(FAILED, agent.take()[2], WORD.pack(2 | FAILED_DIRECTORY))
    with pytest.raises(FileNotFoundError) as caught:
        process.wait(20)
    assert caught.value.filename == "/nowhere"


def test_no_more_is_sent_than_both_windows_allow(pair) -> None:
    link, agent = pair
    agent.ready()
    process = link.start(["cat"], stdout=[].append)
    number = agent.take()[2]
    data = bytes(range(256)) * 1024  # four times what a process may have waiting
    writer = threading.Thread(target=lambda: (process.write(data), process.close_stdin()))
    writer.start()
    # Without an ACK the line stops, and no sooner.
    agent.line.settimeout(1)
    got = b""
    with pytest.raises(TimeoutError):
        while True:
            got += agent.line.recv(65536)
    assert len(got) == LINE_WINDOW
    # With ACKs but no CREDIT, standard input stops.
    agent.send(ACK, 0, WORD.pack(len(got)))
    with pytest.raises(TimeoutError):
        while True:
            piece = agent.line.recv(65536)
            got += piece
            agent.send(ACK, 0, WORD.pack(len(piece)))
    frames, at = b"", 0
    while at < len(got):
        kind, _, to, size = HEADER.unpack_from(got, at)
        assert (kind, to) == (STDIN, number)
        frames += got[at + HEADER.size : at + HEADER.size + size]
        at += HEADER.size + size
    assert len(frames) == STDIN_WINDOW
    # With both, everything comes, in order.
    agent.line.settimeout(20)
    agent.send(CREDIT, number, WORD.pack(STDIN_WINDOW))
    while True:
        kind, _, _, payload = agent.take()
        if kind == STDIN_EOF:
            break
        frames += payload
        agent.send(CREDIT, number, WORD.pack(len(payload)))
    writer.join(20)
    assert frames == data


def test_a_writer_is_let_go_when_the_command_ends(pair) -> None:
    link, agent = pair
    agent.ready()
    process = link.start(["true"])
    number = agent.take()[2]
    agent.send(EXIT, number, WORD.pack(0))
    assert process.wait(20) == 0
    process.write(bytes(10 * STDIN_WINDOW))  # dropped, not waited for
    process.send_signal(9)


def test_the_guest_ends_while_a_command_runs(pair) -> None:
    link, agent = pair
    agent.ready()
    process = link.start(["sleep", "100"])
    agent.take()
    agent.line.shutdown(socket.SHUT_RDWR)
    with pytest.raises(GuestEnded, match="sleep"):
        process.wait(20)
    with pytest.raises(GuestEnded):
        link.start(["true"])
    assert link.ended


def test_a_sink_that_fails_fails_its_command_alone(pair) -> None:
    link, agent = pair
    agent.ready()

    def full(_: bytes) -> None:
        raise BrokenPipeError

    bad = link.start(["yes"], stdout=full)
    bad_number = agent.take()[2]
    good = link.start(["true"])
    good_number = agent.take()[2]
    agent.send(STDOUT, bad_number, b"y\n")
    agent.send(STDOUT, bad_number, b"y\n")
    agent.send(EXIT, good_number, WORD.pack(0))
    with pytest.raises(BrokenPipeError):
        bad.wait(20)
    assert good.wait(20) == 0


@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(EXIT, 0, 1, 0),
        HEADER.pack(CREDIT, 0, 1, 3) + b"abc",
        HEADER.pack(ACK, 0, 0, 8) + bytes(8),
        HEADER.pack(ACK, 0, 0, 4) + b"\xff\xff\xff\xff",
        HEADER.pack(STDOUT, 0, 999, 3) + b"abc",
        HEADER.pack(0xEE, 9, 1, 2) + b"ab",
        HEADER.pack(READY, 0, 0, 3) + b"abc",
        HEADER.pack(frames.STARTED, 0, 1, 2) + b"ab",
        HEADER.pack(EXIT, 0, 77, 4) + bytes(4),
    ],
)
def test_what_a_hostile_guest_sends_does_no_harm(pair, frame: bytes) -> None:
    link, agent = pair
    agent.ready()
    process = link.start(["true"])
    number = agent.take()[2]
    agent.line.sendall(frame)
    agent.send(EXIT, number, WORD.pack(0))
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("args", "env"),
    [
        ([], {}),
        ([""], {}),
        (["a\0b"], {}),
        (["a"] * 1100, {}),
        (["a" * 40000], {}),
        (["a"], {"X": "y" * 40000}),
    ],
)
def test_commands_that_cannot_be_passed_on(args: list[str], env: dict[str, str]) -> None:
    with pytest.raises(InputError):
        pack_exec(args, env, "/", (0, 0))


def test_nothing_is_sent_before_the_agent_is_there(pair) -> None:
    link, agent = pair
    starter = threading.Thread(target=lambda: link.start(["true"]), daemon=True)
    starter.start()
    agent.line.settimeout(0.2)
    with pytest.raises(TimeoutError):
        agent.line.recv(1)
    agent.line.settimeout(20)
    agent.ready()  # HELLO comes first
    assert agent.take()[0] == EXEC
    starter.join(20)


def test_an_agent_that_is_started_again_loses_commands_and_takes_new_ones(pair) -> None:
    link, agent = pair
    agent.ready(1)
    lost = link.start(["sleep", "1"], stdout=[].append)
    number = agent.take()[2]
    # The old one was cut off in the middle of a frame; the new one fills it up, and more, with zeros.
    agent.line.sendall(HEADER.pack(STDOUT, 0, number, OUTPUT_MAX) + b"x" * 1001)
    agent.line.sendall(bytes(OUTPUT_MAX + 512))
    assert agent.take()[0] == TAKEN
    agent.ready(2)
    with pytest.raises(GuestError, match="started again"):
        lost.wait(20)
    process = link.start(["true"])
    agent.send(EXIT, agent.take()[2], WORD.pack(0))
    assert process.wait(20) == 0


def test_an_agent_of_another_version_is_named(pair) -> None:
    link, agent = pair
    agent.send(READY, 0, b"ringzero-agent-1\n")
    with pytest.raises(GuestError, match="speaks version 1 of its protocol"):
        link.wait_ready(20)


def test_a_stream_that_nobody_reads_holds_a_window_and_no_more(pair) -> None:
    link, agent = pair
    agent.ready()
    pipe = OutputPipe(STDOUT)
    process = link.start(["yes"], stdout=pipe)
    pipe.attach(process)
    number = agent.take()[2]
    for _ in range(OUTPUT_WINDOW // OUTPUT_MAX):
        agent.send(STDOUT, number, bytes(OUTPUT_MAX))
    # What is read is said to be taken, and others are served meanwhile.
    other = link.start(["true"])
    agent.send(EXIT, agent.take()[2], WORD.pack(0))
    assert other.wait(20) == 0
    assert pipe.readinto(bytearray(OUTPUT_WINDOW)) == OUTPUT_WINDOW
    assert agent.take() == (TAKEN, 0, number, WORD.pack(OUTPUT_WINDOW))
    # An agent that sends more than its window is none of ours.
    for _ in range((OUTPUT_WINDOW + OUTPUT_LEFT) // OUTPUT_MAX + 1):
        agent.send(STDOUT, number, bytes(OUTPUT_MAX))
    with pytest.raises(GuestError, match="more output"):
        process.wait(20)


def test_an_enormous_frame_is_not_waited_for(pair) -> None:
    link, agent = pair
    agent.ready()
    process = link.start(["true"])
    agent.take()
    agent.line.sendall(HEADER.pack(STDOUT, 0, 1, 0xFFFFFFFF))
    with pytest.raises(GuestError, match="4294967295 bytes"):
        process.wait(20)
    with pytest.raises(GuestError, match="broke its protocol"):
        link.wait_ready(20)
    agent.line.sendall(bytes(1_000_003))  # thrown away
    agent.ready()
    assert link.wait_ready(20)


def test_a_guest_that_acknowledges_nothing_cannot_hold_up_a_timeout(pair, monkeypatch) -> None:
    monkeypatch.setattr(guest_process, "PATIENCE", 0.2)
    link, agent = pair
    agent.ready()
    with pytest.raises(subprocess.TimeoutExpired):
        run(link, ["cat"], input=bytes(10 * STDIN_WINDOW), timeout=0.2)


def test_a_guest_that_acknowledges_what_was_not_sent_cannot_hold_up_a_timeout(pair, monkeypatch) -> None:
    monkeypatch.setattr(guest_process, "PATIENCE", 0.2)
    link, agent = pair
    agent.ready()
    for _ in range(100):  # as if everything had been read and taken, always
        agent.send(ACK, 0, WORD.pack(0x7FFFFFFF))
        agent.send(CREDIT, 1, WORD.pack(0x7FFFFFFF))
    with pytest.raises(subprocess.TimeoutExpired):
        run(link, ["cat"], input=bytes(4_000_000), timeout=0.2)


def test_a_flood_of_rubbish_takes_no_memory(pair) -> None:
    link, agent = pair
    agent.ready()
    process = link.start(["true"])
    number = agent.take()[2]
    for _ in range(200):
        agent.send(STDOUT, 999, bytes(OUTPUT_MAX))  # of no command
        agent.send(EXIT, 999, WORD.pack(0))
    agent.send(EXIT, number, WORD.pack(0))
    assert process.wait(20) == 0
    assert not link._credits
    assert not link._processes


@pytest.fixture
def moving():
    """A link over two lines, an agent on the first, and the second's other end, once it was asked for."""
    ours, theirs = socket.socketpair()
    port, port_theirs = socket.socketpair()
    asked = []
    link = AgentLink(AgentLines(ours, lambda: asked.append(1) or port))
    agent = Agent(theirs)
    agent.ready(77)
    yield link, agent, Agent(port_theirs), asked
    theirs.close()
    port_theirs.close()
    link.close()


HELLO_77 = HEADER.pack(HELLO, 0, 0, len(MAGIC) + 4) + MAGIC + WORD.pack(77)


def move(agent: Agent, port: Agent) -> None:
    """Do the agent's part of a move; what it had said before over the port is not for this agent's host."""
    agent.send(OFFER, 0)
    assert agent.take() == (MOVE, 0, 0, b"")
    agent.send(MOVED, 0)
    assert port.exactly(len(HELLO_77)) == HELLO_77
    port.send(READY, 0, MAGIC + WORD.pack(76))
    port.line.sendall(b"rubbish")
    port.send(READY, 0, MAGIC + WORD.pack(77))


def test_an_agent_moves_to_the_port_with_what_runs(moving) -> None:
    link, agent, port, asked = moving
    out: list[bytes] = []
    process = link.start(["cat"], stdout=out.append)
    number = agent.take()[2]
    agent.send(STDOUT, number, b"one ")
    assert not asked  # nobody is at the other end of a port that is not wanted
    move(agent, port)
    process.write(b"to the port")
    assert port.take() == (STDIN, 0, number, b"to the port")
    port.send(STDOUT, number, b"two")
    port.send(EXIT, number, WORD.pack(0))
    assert process.wait(20) == 0
    assert b"".join(out) == b"one two"


def test_a_frame_that_was_begun_ends_on_the_line_where_it_began(moving) -> None:
    link, agent, port, _ = moving
    process = link.start(["cat"])
    number = agent.take()[2]
    sender = threading.Thread(target=lambda: process.write(bytes(STDIN_WINDOW)))
    sender.start()
    agent.line.settimeout(0.3)
    got = b""
    with pytest.raises(TimeoutError):  # the line's window is full, in the middle of a frame
        while True:
            got += agent.line.recv(65536)
    agent.line.settimeout(20)
    agent.send(OFFER, 0)
    agent.send(ACK, 0, WORD.pack(len(got)))
    at = 0
    while True:
        while len(got) < at + HEADER.size or len(got) < at + HEADER.size + HEADER.unpack_from(got, at)[3]:
            got += agent.exactly(1)
        kind, _, _, size = HEADER.unpack_from(got, at)
        at += HEADER.size + size
        if kind == MOVE:
            break
        assert kind == STDIN
    agent.send(MOVED, 0)
    assert port.exactly(len(HELLO_77)) == HELLO_77
    port.send(READY, 0, MAGIC + WORD.pack(77))
    port.send(ACK, 0, WORD.pack(at))
    came = at - HEADER.size - HEADER.size * (at // (HEADER.size + guest_process.STDIN_CHUNK))
    while came < STDIN_WINDOW:
        kind, _, to, payload = port.take()
        assert (kind, to) == (STDIN, number)
        came += len(payload)
    sender.join(20)
    assert came == STDIN_WINDOW


def test_an_agent_that_was_started_again_begins_on_the_first_line(moving) -> None:
    link, agent, port, asked = moving
    move(agent, port)
    lost = link.start(["sleep", "1"])
    assert port.take()[0] == EXEC
    agent.line.sendall(bytes(5000))
    agent.ready(78)
    with pytest.raises(GuestError, match="started again"):
        lost.wait(20)
    process = link.start(["true"])
    agent.send(EXIT, agent.take()[2], WORD.pack(0))
    assert process.wait(20) == 0
    agent.send(OFFER, 0)
    assert agent.take()[0] == MOVE
    assert len(asked) == 1  # the port is joined once


def test_an_agent_that_moves_without_being_asked_breaks_the_protocol(moving) -> None:
    link, agent, _, _ = moving
    process = link.start(["true"])
    agent.take()
    agent.send(MOVED, 0)
    with pytest.raises(GuestError, match="was not told to"):
        process.wait(20)


def test_an_offer_of_a_port_that_cannot_be_had_is_let_pass() -> None:
    ours, theirs = socket.socketpair()

    def none_left() -> socket.socket:
        raise InputError("no descriptor is left")

    link = AgentLink(AgentLines(ours, none_left))
    agent = Agent(theirs)
    agent.ready()
    agent.send(OFFER, 0)
    process = link.start(["true"])
    agent.send(EXIT, agent.take()[2], WORD.pack(0))
    assert process.wait(20) == 0
    theirs.close()
    link.close()
