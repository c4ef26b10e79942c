"""Machines that are killed while their guests write: what `tools/dev crash` does two hundred times."""

import shutil

import pytest

from house.crash.trial import KINDS, trial

pytestmark = pytest.mark.needs_debian


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_was_flushed_is_there(kind: str) -> None:
    if kind == "ext4" and shutil.which("mke2fs") is None and shutil.which("/sbin/mke2fs") is None:
        pytest.skip("no mke2fs (apt: e2fsprogs)")
    result = trial(kind, seed=7)
    assert result.wrong == []
    assert result.flushed > 0
