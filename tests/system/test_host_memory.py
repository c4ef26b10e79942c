"""The arbiter with real guests: what a policy decides is done, and seen, and no guest is hurt by it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero import Host, Machine
from ringzero.errors import InputError
from ringzero.host import trace

from .test_host import SMALL, eventually, kill, ringzero, root, says  # noqa: F401 - a fixture among them

pytestmark = pytest.mark.needs_debian

# Takes what the file says of each VM, whatever the counters are.
POLICY = """
import json, pathlib
from dataclasses import replace
from ringzero.policy import decide as ours
HERE = pathlib.Path(__file__).parent / "orders.json"

def decide(host, vms, before):
    decision = ours(host, vms, before)
    orders = json.loads(HERE.read_text()) if HERE.exists() else {}
    def changed(one, vm):
        wanted = dict(orders.get(one.name, {}))
        if "compress" in wanted:
            wanted["compress"] = max(0, wanted["compress"] - vm.compressed - vm.swapped)
        return replace(one, **wanted)
    return replace(decision, vms=tuple(changed(one, vm) for one, vm in zip(decision.vms, vms)))
"""


@pytest.fixture
def ordered(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:  # noqa: F811
    policy = tmp_path / "policy.py"
    policy.write_text(POLICY)
    with Host.connect(
        root,
        start=True,
        memory="4G",
        swap="1G",
        swap_folder=tmp_path,
        policy=policy,
        record=tmp_path / "trace",
    ) as host:
        yield host


def test_orders_reach_the_guests(ordered: Host, root: Path, tmp_path: Path) -> None:  # noqa: F811
    squeezed, swapped, left = ordered.up_many(3, "debian", min="8M", **SMALL)
    swapped.run(["sh", "-c", "seq 1 400000 > /tmp/numbers"], check=True)
    sums = [vm.run(["sha256sum", "/tmp/numbers"]).stdout for vm in (swapped,)]
    orders = {squeezed.name: {"balloon": 5000}, swapped.name: {"compress": 6000}}
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    assert eventually(lambda: squeezed.memory.pages.get("ballooned") == 5000, 40)
    assert eventually(
        lambda: sum(swapped.memory.pages[state] for state in ("compressed", "swapped")) > 3000, 40
    )
    assert left.memory.pages["ballooned"] == left.memory.pages["swapped"] == 0
    # What was taken comes back right, and the guests run on.
    (tmp_path / "orders.json").write_text("{}")
    assert [swapped.run(["sha256sum", "/tmp/numbers"]).stdout] == sums
    assert all(says(vm) for vm in (squeezed, swapped, left))
    assert ordered.audit() == {name: [] for name in ("sharer", squeezed.name, swapped.name, left.name)}
    # The balloon lets go.
    assert eventually(lambda: squeezed.memory.pages["ballooned"] == 0, 40)
    assert swapped.memory.stats["evicted"] > 3000
    # All of it was recorded.
    instants = trace.read(tmp_path / "trace")
    assert max(vm.ballooned for instant in instants for vm in instant.vms) == 5000
    # And it can be seen.
    shown = ringzero(root, "top", "--once").stdout
    assert "BALLOON" in shown and swapped.name in shown
    rows = json.loads(ringzero(root, "top", "--json").stdout)
    assert {row["name"] for row in rows["vms"]} == {squeezed.name, swapped.name, left.name}
    assert rows["host"]["level"] == "high" and all(row["cpu"] > 0 for row in rows["vms"])
    assert f'ringzero_vm_memory_bytes{{state="private",vm="{left.name}"}}' in ringzero(root, "metrics").stdout
    assert "\u258c" in ringzero(root, "map").stdout
    assert ringzero(root, "map", left.name, "--png", str(tmp_path / "map.png")).returncode == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert ringzero(root, "audit").stdout == "the sharer and 3 vms, no fault\n"
    replayed = subprocess.run(
        [sys.executable, "-m", "ringzero", "host", "simulate", str(tmp_path / "trace")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert left.name in replayed.stdout


def test_memory_of_a_machine_in_ones_own_process() -> None:
    with Machine("debian", memory="96M") as machine:
        machine.wait_ready(60)
        memory = machine.memory
        assert memory.size == 96 << 20 and sum(memory.pages.values()) == (96 << 20) // 4096
        assert eventually(lambda: memory.stats["balloon_driver"] == 1, 20)
        memory.target = "80M"
        assert memory.target == 80 << 20
        assert eventually(lambda: memory.pages["ballooned"] == 4096, 20)
        assert eventually(lambda: memory.stats["guest_total"] > 0, 20)
        memory.target = memory.size
        assert eventually(lambda: memory.pages["ballooned"] == 0, 20)
        assert memory.audit() == []
        assert len(memory.states()) == (96 << 20) // 4096
        with pytest.raises(InputError, match="more than the guest has"):
            memory.target = "1G"


def test_what_a_boot_leaves_behind_goes_to_the_host(ordered: Host, tmp_path: Path) -> None:
    # No scanner that finds pages of zeroes meanwhile.
    (tmp_path / "orders.json").write_text(json.dumps({"booted": {"scan": 0}}))
    vm = ordered.up("debian", name="booted", **SMALL)
    assert eventually(lambda: vm.memory.pages.get("private", 0) > 0, 40)
    before = vm.memory.pages["private"]
    assert eventually(lambda: vm.memory.pages["private"] < before - 800, 40)
    assert vm.memory.pages["ballooned"] == 0
    assert says(vm)


def test_vms_share_pages_and_survive_their_sharer(root: Path) -> None:  # noqa: F811
    policy = root.parent / "eager.py"
    policy.write_text("from ringzero.policy import Parameters\nparameters = Parameters(scan_calm=200_000)\n")
    with Host.connect(root, start=True, memory="4G", policy=policy) as host:
        ours = host.up_many(2, "debian", share_group="ours", **SMALL)
        other = host.up("debian", share_group="other", name="other", **SMALL)
        assert eventually(lambda: all(vm.memory.pages.get("shared", 0) > 3000 for vm in ours), 30)
        assert eventually(lambda: host.top()["host"]["shared"] > 3000)
        assert host.top()["host"]["shared"] < sum(vm.memory.pages.get("shared", 0) for vm in (*ours, other))
        kill(host.status()["sharer"])
        assert eventually(lambda: any("another one" in event.text for event in host.events()))
        assert not [event for event in host.events() if "no more pages" in event.text]
        # They go on with what they share, and what is written is each one's own.
        ours[0].run(["sh", "-c", "seq 1 100000 > /tmp/a; sync"], check=True)
        assert all(says(vm) for vm in (*ours, other))
        assert eventually(lambda: not any(host.audit().values()), 10)
        # A VM that is killed gives back what it used.
        kill(ours[0].row()["pid"])
        assert eventually(lambda: ours[0].phase == "ended")
        assert says(ours[1])
        assert not any(host.audit().values())
        # A daemon that is killed, and its sharer with it.
        before = host.status()
        kill(before["pid"])
        kill(before["sharer"])
        with pytest.raises(InputError, match="ended"):
            host.vms()
    with Host.connect(root, start=True, memory="4G", policy=policy) as host:
        assert {vm.name for vm in host.vms() if vm.phase == "running"} == {ours[1].name, "other"}
        again = host.vm(ours[1].name)
        assert again.memory.pages.get("shared", 0) > 1000 and says(again)
        newcomer = host.up("debian", share_group="ours", name="newcomer", **SMALL)
        assert eventually(lambda: newcomer.memory.pages.get("shared", 0) > 3000, 30)
        assert not any(host.audit().values())
