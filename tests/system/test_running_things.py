"""The examples of docs/running-things.md and of the README, as they are printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs_debian

PAGE = Path(__file__).parents[2] / "docs" / "running-things.md"
README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"## ([^\n]*)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_there_are_examples() -> None:
    assert [name for name, _ in EXAMPLES] == ["Commands", "Files", "asyncio", "In tests", "Without the agent"]
    assert len(IN_README) >= 1


# "In tests" is run by a pytest of its own: test_pytest_plugin.py.
IN_README = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
RUN = [(name, text) for name, text in EXAMPLES if name != "In tests"]
RUN += [(f"README-{number}", text) for number, text in enumerate(IN_README)]


@pytest.mark.parametrize("text", [text for _, text in RUN], ids=[name for name, _ in RUN])
def test_an_example_does_what_it_says(text: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, timeout=120)
