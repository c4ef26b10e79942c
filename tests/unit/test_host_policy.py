"""A user's policy from a file: what it may be, and that each mistake in it is one sentence."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ringzero import policy
from ringzero.errors import InputError
from ringzero.host.policy import MemoryPolicy, OwnPolicy, load_policy
from ringzero.policy import Admission, Level, Parameters
from tests.unit.memory_hosts import MIB, two_vms

EVEN = """
from __future__ import annotations

from dataclasses import dataclass, replace

from ringzero.policy import Admission, Decision, HostMemory, VmMemory, decide

@dataclass
class Seen:  # dataclasses need the module that they are in
    vms: int = 0

seen = Seen()

def decide(host, vms, before, ours=decide):
    "Everybody's target is his min."
    seen.vms = len(vms)
    decision = ours(host, vms, before)
    return replace(decision, vms=tuple(replace(one, target=vm.min) for one, vm in zip(decision.vms, vms)))
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_a_policy_of_ones_own_decides_and_the_rest_is_ours(tmp_path: Path) -> None:
    mine: MemoryPolicy = load_policy(written(tmp_path, EVEN))
    assert mine.name == "mine"
    host, vms = two_vms(360 * MIB, Parameters())
    assert [one.target for one in mine.decide(host, vms, None).vms] == [32 * MIB, 32 * MIB]
    newcomer = replace(vms[0], name="new")
    assert mine.admit(host, vms, newcomer) == OwnPolicy().admit(host, vms, newcomer)


def test_parameters_alone_are_a_policy(tmp_path: Path) -> None:
    host, vms = two_vms(360 * MIB, Parameters())
    text = "from ringzero.policy import Parameters, decide, admit\nparameters = Parameters(tax=0)\n"
    mine = load_policy(written(tmp_path, text))
    assert mine.parameters.tax == 0
    assert [one.target for one in mine.decide(host, vms, None).vms] == [180 * MIB, 180 * MIB]
    assert OwnPolicy().decide(host, vms, None).vms[1].target == 256 * MIB


def test_a_policy_may_admit_as_it_likes(tmp_path: Path) -> None:
    text = "from ringzero.policy import *\nparameters = Parameters()\n"
    text += "def admit(host, vms, newcomer):\n    return Admission(len(vms) < 3, 'three are a crowd')\n"
    mine = load_policy(written(tmp_path, text))
    host, vms = two_vms(360 * MIB, Parameters())
    assert mine.admit(host, vms, vms[0]) == Admission(True, "three are a crowd")
    assert not mine.admit(host, [*vms, vms[0]], vms[0]).admitted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["neither decide(host, vms, before) nor parameters"]),
        ("def decide(:\n", ["not Python", "line 1"]),
        ("x = '\0'", ["not Python"]),
        ("import nothing_of_that_name\n", ["line 1", "nothing_of_that_name"]),
        ("\nraise SystemExit(3)\n", ["line 2", "SystemExit"]),
        ("decide = 5\n", ["decide is 5", "def decide(host, vms, before)"]),
        ("def decide(host): ...\n", ["three arguments"]),
        ("def decide(host, vms, before):\n    return None\n", ["None and not a Decision"]),
        ("def decide(host, vms, before):\n    return 1 // 0\n", ["decide, line 2", "ZeroDivisionError"]),
        ("parameters = {'tax': 0}\n", ["not a Parameters"]),
        ("from ringzero.policy import Parameters\nparameters = Parameters(tax=1)\n", ["line 2", "tax 1"]),
        ("def decide(host, vms, before): raise ValueError('two\\nlines')\n", ["two lines"]),
        (EVEN.replace("vm.min", "vm.min - 1"), ["'idle'", "outside its min 32 MiB"]),
        (EVEN.replace("vm.min", "vm.size + 1"), ["'idle'", "outside"]),
        (EVEN.replace("target=vm.min", "swap=vm.size"), ["'idle'", "compressing and swapping"]),
        (EVEN.replace("zip(decision.vms, vms)", "zip(decision.vms, vms[1:])"), ["each vm once"]),
        (
            "from ringzero.policy import Decision\n"
            "def decide(host, vms, before): return Decision(level=before, vms=5)\n",
            ["level is None"],
        ),
        (
            "from ringzero.policy import Decision, Level\n"
            "def decide(host, vms, before): return Decision(level=Level.LOW, vms=5)\n",
            ["failed in decide", "TypeError"],
        ),
        (EVEN + "\ndef admit(host, vms, newcomer): return True\n", ["True and not an Admission"]),
        (EVEN + "\ndef admit(host, vms): ...\n", ["def admit(host, vms, newcomer)"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_policy(path)
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said
    for word in words:
        assert word in said


def test_files_that_are_no_policies(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no policy"):
        load_policy(tmp_path / "none.py")
    with pytest.raises(InputError, match="there is no policy"):
        load_policy(tmp_path)
    with pytest.raises(InputError, match="larger than 1 MiB"):
        load_policy(written(tmp_path, "#" * (2 << 20)))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x01" * 10)
    with pytest.raises(InputError, match="not Python"):
        load_policy(tmp_path / "bytes")


def test_a_decision_is_checked_every_time_not_only_on_the_example(tmp_path: Path) -> None:
    text = EVEN.replace("target=vm.min", "target=vm.min if vm.name in ('idle', 'busy') else vm.max + 1")
    mine = load_policy(written(tmp_path, text))
    host, vms = two_vms(360 * MIB, Parameters())
    mine.decide(host, vms, None)
    with pytest.raises(InputError, match="'other'"):
        mine.decide(host, [vms[0], replace(vms[1], name="other")], None)


def test_the_policies_of_the_documentation_work(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/memory-policy.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    host, vms = two_vms(360 * MIB, Parameters())
    without_tax, strict = (load_policy(written(tmp_path, text)) for text in examples)
    assert without_tax.decide(host, vms, None).vms[0].target == 180 * MIB
    # Rich as the host may be, a VM that holds more than its target loses that.
    assert strict.decide(host, vms, None).vms[0].balloon >= (256 - 104 - 1) * MIB


def test_what_a_policy_file_may_import_is_there() -> None:
    assert sorted(policy.__all__) == sorted(set(policy.__all__))
    for name in policy.__all__:
        assert getattr(policy, name) is not None
    assert [level.name for level in Level] == ["HIGH", "SOFT", "HARD", "LOW"]
