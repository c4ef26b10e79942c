"""kvm-unit-tests' own list of tests, x86/unittests.cfg: what each one runs, and which of them are left out here."""

import shlex
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from house.shell import Failed

LIST = Path("x86/unittests.cfg")

# Left out for what the processor that guests see does not have: docs/conformance.md tells the same.
LEFT_OUT_GROUPS = {
    "svm": "nested virtualization: no SVM in CPUID",
    "vmx": "nested virtualization: no VMX in CPUID",
    "hyperv": "an interface of Hyper-V, not of a processor",
    "pmu": "no performance counters in CPUID",
    "nodefault": "left out by the suite itself: wants KVM's forced emulation",
}
LEFT_OUT = {
    "svm_npt": LEFT_OUT_GROUPS["svm"],
    "svm_unsupported_instruction_intercept_test": LEFT_OUT_GROUPS["svm"],
    "asyncpf": "an interface of KVM, not of a processor",
    "kvmclock_test": "an interface of KVM, not of a processor",
    "vmware_backdoors": "an interface of VMware, not of a processor",
    "access-reduced-maxphyaddr": "wants KVM's allow_smaller_maxphyaddr",
    "intel_iommu": "no IOMMU",
    "s3": "no sleep states but off",
    "realmode": "real mode: a later issue",
    "syscall": "32-bit SYSCALL of AMD's processors: an invalid opcode on Intel's, as which ours shows itself",
}


@dataclass(frozen=True)
class Case:
    """One section of the list. `processors` and `timeout` (seconds) as the list has them."""

    name: str
    file: str
    processors: int = 1
    timeout: float = 90.0
    groups: frozenset[str] = frozenset()
    arguments: tuple[str, ...] = ()
    qemu: tuple[str, ...] = field(default=())

    @property
    def left_out(self) -> str | None:
        """Why this test is not run here, or None."""
        reasons = [LEFT_OUT_GROUPS[group] for group in sorted(self.groups) if group in LEFT_OUT_GROUPS]
        return LEFT_OUT.get(self.name, reasons[0] if reasons else None)

    @property
    def wants_all(self) -> bool:
        """Whether the processor is to have all that there is: the list says `-cpu max`."""
        models = [after for word, after in pairwise(self.qemu) if word == "-cpu"]
        return any(model.split(",")[0] == "max" for model in models)

    @property
    def memory(self) -> str:
        """The memory that the test wants, as QEMU's -m says it, or what is enough for all others."""
        if "-m" not in self.qemu[:-1]:
            return "256M"
        size = self.qemu[self.qemu.index("-m") + 1]
        return f"{size}M" if size.isdecimal() else size


def read_list(suite: Path) -> list[Case]:
    """Return the 64-bit tests of a checkout. Raises Failed when this is none."""
    try:
        lines = (suite / LIST).read_text().splitlines()
    except OSError as error:
        raise Failed(f"{suite} is no checkout of kvm-unit-tests: {error.strerror}", 2) from None
    sections: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in lines:
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            current = sections.setdefault(line[1:-1], {})
        elif "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            current[key.strip()] = value.strip()
    tests = [_test(name, keys) for name, keys in sections.items() if keys.get("arch") != "i386"]
    if not tests:
        raise Failed(f"{suite / LIST} lists no test: is this kvm-unit-tests?", 2)
    return tests


def _test(name: str, keys: dict[str, str]) -> Case:
    def words(key: str) -> tuple[str, ...]:
        return tuple(shlex.split(keys.get(key, "")))

    # test_args is quoted once for the shell of the suite's own runner.
    return Case(
        name=name,
        file=keys.get("file", f"{name}.flat"),
        processors=int(keys.get("smp", "1").partition(",")[0]),
        timeout=float(keys.get("timeout", "90").removesuffix("s")),
        groups=frozenset(keys.get("groups", "").split()),
        arguments=words("test_args"),
        qemu=words("qemu_params") or words("extra_params"),
    )
