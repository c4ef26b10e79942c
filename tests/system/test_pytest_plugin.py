"""The plugin of pytest's, in a pytest of its own, with the example of docs/running-things.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs_debian

PAGE = Path(__file__).parents[2] / "docs" / "running-things.md"


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # A source tree has no entry points: there the plugin is named.
    command = [sys.executable, "-m", "pytest", "-p", "ringzero.testing.plugin", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_example_of_the_page(tmp_path: Path) -> None:
    (example,) = re.findall(r"## In tests\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "test_example.py").write_text(example)
    done = run_pytest(tmp_path, "-q")
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_image_and_the_memory_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test_it(ringzero):\n"
        "    assert ringzero.run(['uname', '-r'], text=True).stdout.startswith('6.12')\n"
        "    assert ringzero.memory.size == 128 << 20\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nringzero_memory = 128M\n")
    done = run_pytest(tmp_path, "-q", "--ringzero-image", "debian:6.12")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_each_test_has_a_fresh_guest_of_the_other_kind(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('number', [1, 2])\n"
        "def test_it(ringzero_disk, number):\n"
        "    assert not ringzero_disk.path('/root/left').exists()\n"
        "    ringzero_disk.path('/root/left').touch()\n"
    )
    done = run_pytest(tmp_path, "-q", "--ringzero-disk-image", "debian", "--ringzero-memory", "128M")
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_run_without_a_guest_imports_nothing_of_ours(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\n\ndef test_it():\n    assert 'ringzero.machine.machine' not in sys.modules\n"
    )
    assert "1 passed" in run_pytest(tmp_path, "-q").stdout
