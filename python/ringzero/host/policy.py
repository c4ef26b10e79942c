"""Which memory policy a host follows: our own (`ringzero.policy`), or one from a user's file.

A policy is asked for a decision every period, and before a VM starts. What it is told is in
`ringzero.policy.counters`, which also says who has to count what; what it may decide, in
`ringzero.policy.decide`. A file for `--policy FILE` is Python and has at the top level

    decide(host, vms, before)       -> Decision; `before` is the last one, or None
    admit(host, vms, newcomer)      -> Admission; our own if it is not there
    parameters                      a Parameters, for our own functions where the file has none

and at least one of `decide` and `parameters`. It imports what it wants of `ringzero.policy`. The file is the
operator's program and runs with all his rights; only its mistakes are held off: every decision is checked
against the bounds of each VM before anybody acts on it.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ringzero import policy
from ringzero.errors import InputError
from ringzero.policy import Admission, Decision, HostMemory, Parameters, VmMemory

__all__ = ["FilePolicy", "MemoryPolicy", "OwnPolicy", "load_policy"]

LARGEST = 1 << 20
"""Bytes: a policy is twenty lines, and a disk image given by mistake is not read to its end."""


class MemoryPolicy(Protocol):
    """Who decides over the memory of a host."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    @property
    def parameters(self) -> Parameters:
        """Its figures: the sampler's pace and averages are set by them, too."""

    def decide(self, host: HostMemory, vms: Sequence[VmMemory], before: Decision | None) -> Decision:
        """Decide over all VMs from the counters of now."""

    def admit(self, host: HostMemory, vms: Sequence[VmMemory], newcomer: VmMemory) -> Admission:
        """Say whether `newcomer` may start beside `vms`."""


@dataclass(frozen=True, slots=True)
class OwnPolicy:
    """Our own policy, after Waldspurger, OSDI 2002."""

    name: str = "default"
    parameters: Parameters = field(default_factory=Parameters)

    def decide(self, host: HostMemory, vms: Sequence[VmMemory], before: Decision | None) -> Decision:
        """Decide over all VMs from the counters of now."""
        return policy.decide(host, vms, before, self.parameters)

    def admit(self, host: HostMemory, vms: Sequence[VmMemory], newcomer: VmMemory) -> Admission:
        """Say whether `newcomer` may start beside `vms`."""
        return policy.admit(host, vms, newcomer, self.parameters)


@dataclass(frozen=True, slots=True)
class FilePolicy:
    """A user's policy; whatever it does wrong is an InputError of one sentence."""

    path: Path
    parameters: Parameters
    decides: Callable[[HostMemory, Sequence[VmMemory], Decision | None], Any] | None
    admits: Callable[[HostMemory, Sequence[VmMemory], VmMemory], Any] | None

    @property
    def name(self) -> str:
        """The file's name, without the ending."""
        return self.path.stem

    def decide(self, host: HostMemory, vms: Sequence[VmMemory], before: Decision | None) -> Decision:
        """Ask the file, and check what it says."""
        if self.decides is None:
            return policy.decide(host, vms, before, self.parameters)
        decision = _guarded(self.path, "decide", self.decides, host, tuple(vms), before)
        fault = _guarded(self.path, "decide", policy.fault_of, decision, vms)
        if fault is not None:
            raise InputError(f"policy {self.path}: {fault}")
        assert isinstance(decision, Decision)
        return decision

    def admit(self, host: HostMemory, vms: Sequence[VmMemory], newcomer: VmMemory) -> Admission:
        """Ask the file, or our own policy where it has no say in this."""
        if self.admits is None:
            return policy.admit(host, vms, newcomer, self.parameters)
        answer = _guarded(self.path, "admit", self.admits, host, tuple(vms), newcomer)
        if not isinstance(answer, Admission):
            raise InputError(f"policy {self.path}: admit returns {answer!r:.60} and not an Admission")
        return answer


def load_policy(path: Path) -> FilePolicy:
    """Load a user's policy and try it on an example. Raises InputError, one sentence, for what is wrong."""
    module = _run(path)
    parameters = getattr(module, "parameters", None)
    decides = getattr(module, "decide", None)
    admits = getattr(module, "admit", None)
    if decides is None and parameters is None:
        raise InputError(
            f"policy {path} has neither decide(host, vms, before) nor parameters: docs/memory-policy.md has both"
        )
    if parameters is not None and not isinstance(parameters, Parameters):
        raise InputError(f"policy {path}: parameters is {parameters!r:.60} and not a Parameters")
    _takes_three(path, "decide(host, vms, before)", decides)
    _takes_three(path, "admit(host, vms, newcomer)", admits)
    # Ours, imported for the file's own use: then it is to go by the file's parameters.
    decides = None if decides is policy.decide else decides
    admits = None if admits is policy.admit else admits
    loaded = FilePolicy(path, parameters or Parameters(), decides, admits)
    host, vms, newcomer = _example()
    loaded.decide(host, vms, loaded.decide(host, vms, None))
    loaded.admit(host, vms, newcomer)
    return loaded


_numbers = itertools.count()


def _run(path: Path) -> ModuleType:
    """Run the file as a module of its own, whatever its name is."""
    if not path.is_file():
        raise InputError(f"there is no policy {path}: give a Python file")
    try:
        with path.open("rb") as file:
            source = file.read(LARGEST + 1)
    except OSError as error:
        raise InputError(f"policy {path} cannot be read: {error.strerror}") from error
    if len(source) > LARGEST:
        raise InputError(
            f"policy {path} is larger than {LARGEST >> 20} MiB, and no Python file of a policy is"
        )
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise InputError(f"policy {path} is not Python: {error.msg}, line {error.lineno}") from error
    except ValueError as error:  # bytes that are no text
        raise InputError(f"policy {path} is not Python: {error}") from error
    module = ModuleType(f"ringzero_policy_{next(_numbers)}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their own module up
    _guarded(path, "its top level", exec, code, module.__dict__)
    return module


def _guarded(path: Path, what: str, call: Callable[..., Any], *arguments: object) -> Any:
    try:
        return call(*arguments)
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        where = f", line {lines[-1]}" if lines else ""
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"policy {path} failed in {what}{where}: {said}") from error


def _takes_three(path: Path, what: str, function: object) -> None:
    if function is None:
        return
    name = what.partition("(")[0]
    if not callable(function):
        raise InputError(f"policy {path}: {name} is {function!r:.60} and not a function: write def {what}")
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError as error:
        raise InputError(f"policy {path}: {name} does not take three arguments: write def {what}") from error
    except ValueError:  # a function that says nothing of itself: the example will tell
        pass


def _example() -> tuple[HostMemory, list[VmMemory], VmMemory]:
    """Return a host under pressure, to try a policy on."""
    new = VmMemory(name="new", size=65536, min=8192, max=65536, overhead=2048)
    vms = [
        replace(new, name="idle", active=0.05, private=40000, shared=4000, ballooned=10000),
        replace(new, name="busy", active=0.9, private=40000, shared=4000, swapped=1000),
    ]
    host = HostMemory(total=92000, free=2904, shared=5000, swap_size=131072, swap_free=130072)
    return host, vms, new
