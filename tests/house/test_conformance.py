"""`tools/dev conformance` reads the suite's list and its tests' ends rightly, and fails when a test does."""

from pathlib import Path

import pytest

from house.conformance import command, programs, selftests, tcgtests
from house.conformance.command import Trees
from house.conformance.running import PATIENCE, Result, on_ours, read, under_qemu
from house.conformance.unittests import Case, read_list
from house.shell import Failed

LIST = """\
# comment = nothing
[plain]
file = plain.flat
[many]
file = many.flat
smp = 3
test_args = "one two"
qemu_params = -cpu max,+pcid -m 2048
arch = x86_64
timeout = 30
[old]
file = old.flat
arch = i386
[vmx_thing]
file = vmx.flat
groups = vmx other
#[gone]
[syscall]
file = syscall.flat
"""
BOOTED = "enabling apic\nsmp: waiting for 0 APs\n"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "x86").mkdir()
    (tmp_path / "x86/unittests.cfg").write_text(LIST)
    for name in ("plain", "many", "vmx", "syscall"):
        (tmp_path / f"x86/{name}.flat").touch()
    return tmp_path


def test_the_list_is_read(suite: Path) -> None:
    plain, many, vmx, syscall = read_list(suite)
    assert plain == Case("plain", "plain.flat")
    assert (many.processors, many.timeout, many.arguments, many.memory) == (3, 30.0, ("one two",), "2048M")
    assert plain.left_out is many.left_out is None
    assert "VMX" in (vmx.left_out or "")
    assert "AMD" in (syscall.left_out or "")


def test_commands_carry_what_the_list_says(suite: Path) -> None:
    many = read_list(suite)[1]
    qemu = under_qemu(many, suite)
    assert qemu[qemu.index("-m") :].count("-m") == 1
    assert [qemu[qemu.index(word) + 1] for word in ("-m", "-smp", "-append", "-cpu")] == [
        "2048",
        "3",
        "one two",
        "max,+pcid",
    ]
    ours = on_ours(many, suite, "interpret", "settings")
    assert [ours[ours.index(word) + 1] for word in ("--engine", "--cpus", "--memory", "--initrd")] == [
        "interpret",
        "3",
        "2048M",
        "settings",
    ]
    assert "--append=one two" in ours
    assert ours[ours.index("--cpu") + 1] == "+pku,+pks", "max is all that there is"
    assert "--cpu" not in on_ours(read_list(suite)[0], suite, "translate", "settings")


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (1, BOOTED + "PASS: a\n", "pass"),
        (77, BOOTED, "skip"),
        (3, BOOTED, "fail"),
        (1, BOOTED + "FAIL: a\n", "fail"),
        (5, BOOTED, "fail"),
        (124, BOOTED, "timeout"),
        (0, BOOTED, "ended 0"),
        (1, "qemu-system-x86_64: no such thing\n", "did not start (1)"),
        (2, "ringzero: 3 processors are not possible\n", "did not start (2)"),
    ],
)
def test_ends_are_told_apart(status: int, output: str, verdict: str) -> None:
    result = read(status, output, 0.0)
    assert result.verdict == verdict
    assert result.passed == (verdict in ("pass", "skip"))


def test_one_failure_on_an_engine_fails_the_command_but_not_one_under_tcg(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = {"tcg": 3, "interpret": 1, "translate": 1, "direct": 1}

    def run(test: Case, _: Path, where: str) -> Result:
        return read(
            verdicts[where], BOOTED + "PASS: a\n" + f"FAIL: {test.name}\n" * (verdicts[where] == 3), 0.0
        )

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "which", lambda _: "/usr/bin/true")
    assert command.conformance(Trees(suite), [], command.COLUMNS, tmp_path / "out") == 0
    verdicts["translate"] = 3
    assert command.conformance(Trees(suite), ["plain"], command.COLUMNS, tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "vmx_thing  " not in said, "left out"
    assert "plain on translate: fail" in said
    assert (tmp_path / "out/results.json").exists()
    assert (tmp_path / "out/plain.tcg.txt").read_text().startswith("enabling apic")


def test_every_column_has_its_patience() -> None:
    assert set(PATIENCE) == set(command.COLUMNS)


def test_what_is_no_checkout_is_refused(tmp_path: Path, suite: Path) -> None:
    for where, only, words in (
        (None, [], "which tests"),
        (tmp_path / "nowhere", [], "is no checkout"),
        (suite, ["nonsense"], "no test 'nonsense'"),
    ):
        with pytest.raises(Failed, match=words):
            command.conformance(Trees(where), only, ["translate"], tmp_path / "out")
    (suite / "x86/plain.flat").unlink()
    with pytest.raises(Failed, match=r"run \./configure and make"):
        command.conformance(Trees(suite), ["plain"], ["translate"], tmp_path / "out")


def test_outcomes_in_a_guest_are_compared_with_native_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet, loud = "0" * 64, "1" * 64
    told = f"noise\nprogram one_64 0 0 {quiet}\nprogram two_64 1 2 {loud}\n[FAIL]\tit\n"
    suite = programs.Suite("suite", [], frozenset({"one_64"}))
    native = programs.read(suite, told)
    assert native == {"one_64": programs.Outcome(0, 0, quiet), "two_64": programs.Outcome(1, 2, None)}
    inside = dict(native)
    monkeypatch.setattr(programs, "run_natively", lambda suite: native)
    monkeypatch.setattr(programs, "run_in_guest", lambda suite, engine: (inside, told))
    assert programs.compare(suite, ["translate"], tmp_path) == 0
    inside["one_64"] = programs.Outcome(0, 0, loud)
    assert programs.compare(suite, ["translate"], tmp_path) == 1
    del inside["one_64"]
    assert programs.compare(suite, ["translate"], tmp_path) == 1
    assert "did not run" in capsys.readouterr().out


def test_programs_run_natively_as_they_are(tmp_path: Path) -> None:
    program = tmp_path / "one_64"
    program.write_text("#!/bin/sh\necho '[FAIL] it'\nexit 3\n")
    program.chmod(0o755)
    suite = programs.Suite("suite", [program], frozenset())
    assert programs.run_natively(suite) == {"one_64": programs.Outcome(3, 1, None)}


def test_trees_without_tests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no Linux source tree"):
        selftests.build(tmp_path, tmp_path / "out")
    with pytest.raises(Failed, match="no QEMU source tree"):
        tcgtests.build(tmp_path, tmp_path / "out")
