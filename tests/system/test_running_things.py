"""The examples of docs/running-things.md, as they are printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs_debian

PAGE = Path(__file__).parents[2] / "docs" / "running-things.md"
EXAMPLES = re.findall(r"## ([^\n]*)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_there_are_examples() -> None:
    assert [name for name, _ in EXAMPLES] == ["Commands", "Files", "asyncio", "Without the agent"]


@pytest.mark.parametrize("text", [text for _, text in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_an_example_does_what_it_says(text: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, timeout=120)
