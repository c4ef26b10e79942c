"""Folders of the host, as the operator names them."""

from pathlib import Path, PurePosixPath

import pytest

from ringzero import Machine, _core
from ringzero.errors import InputError
from ringzero.machine.mount import Mount


def test_a_mount_is_a_folder_here_and_a_place_there(tmp_path: Path) -> None:
    first, second = Mount.parse_all([f"{tmp_path}:/there", f"{tmp_path}:/a/b:ro"])
    assert (first.here, first.there, first.read_only) == (tmp_path, PurePosixPath("/there"), False)
    assert (second.there, second.read_only) == (PurePosixPath("/a/b"), True)
    assert first.word == "ringzero.mount=mount0:/there"
    assert second.word == "ringzero.mount=mount1:/a/b:ro"
    assert isinstance(first.device(1), _core.VirtioDevice)
    odd = tmp_path / "with:colon"
    odd.mkdir()
    assert Mount.parse(f"{odd}:/there").here == odd
    with pytest.raises(_core.CoreError, match="1 to 36 letters"):
        Mount(tmp_path, PurePosixPath("/a"), tag="no tag").device(1)


def test_what_cannot_be_mounted_is_said(tmp_path: Path) -> None:
    for text, sentence in [
        ("/tmp", "is not HERE:THERE"),
        (f"{tmp_path}:there", "an absolute path"),
        (f"{tmp_path}:/a b", "without spaces"),
        (f"{tmp_path}:/a/../b", "an absolute path"),
        (f"{tmp_path / 'x'}:/a", "no such folder"),
    ]:
        with pytest.raises(InputError, match=sentence):
            Machine("debian", mounts=[text])
    with pytest.raises(InputError, match="two folders"):
        Machine("debian", mounts=[f"{tmp_path}:/a", f"{tmp_path}:/a"])
