"""What every test here may ask for, and the reasons for which one is skipped."""

import os
import shutil
from collections.abc import Iterator
from functools import cache

import pytest


@cache
def no_debian() -> str | None:
    """Return why there is no Debian guest here, or None: from the cache, else through apt, once a run."""
    from ringzero import images
    from ringzero.errors import FetchError

    try:
        images.pull("debian")
    except FetchError as error:
        return f"no Debian guest: {error}"
    return None


@cache
def no_qemu() -> str | None:
    """Return why there is no QEMU to compare with, or None."""
    return None if shutil.which("qemu-system-x86_64") else "no qemu-system-x86_64 (apt: qemu-system-x86)"


@cache
def no_kvm() -> str | None:
    """Return why /dev/kvm cannot be used, or None."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"no usable /dev/kvm: {error.strerror}"
    return None


def no_root() -> str | None:
    """Return why this is not root, or None."""
    return None if os.geteuid() == 0 else "not root"


REASONS = {
    "needs_debian": no_debian,
    "needs_qemu": no_qemu,
    "needs_kvm": no_kvm,
    "needs_root": no_root,
}


@pytest.fixture(scope="session", autouse=True)
def own_translations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the translations of all tests in a folder of their own, for as long as they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGZERO_TRANSLATION_CACHE", str(tmp_path_factory.mktemp("kept") / "translations"))
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs what this machine lacks; `-ra` shows the reason in the summary."""
    for marker, reason in REASONS.items():
        if item.get_closest_marker(marker) is not None:
            lacking = reason()
            if lacking is not None:
                pytest.skip(lacking)
