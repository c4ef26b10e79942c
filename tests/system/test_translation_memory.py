"""A guest with more code than its translations may take: the oldest make way, and nothing goes wrong."""

import pytest

from ringzero import Machine

SCRIPT = "for i in 1 2 3; do seq 1 3000 | sort -r | sort -n | sha256sum; ls -lR /bin /proc/1 | wc -c; done"


@pytest.mark.needs_debian
def test_a_guest_with_little_memory_for_translations_runs_right() -> None:
    with Machine("debian", engine="translate", translation_cache=False, translation_memory="2M") as machine:
        lines = machine.run(["sh", "-c", SCRIPT], check=True, text=True).stdout.split("\n")
        machine.stop()
        counters = machine.stats()
    sums = lines[0:6:2]
    assert sums == ["2e57c67a8bbe706a08d6638ec67da02b67b3743ae7d35948cbcf8d1f45cae0a5  -"] * 3
    assert counters["translate.evictions"] > 50
    assert counters["translate.code_bytes"] < 1 << 20
