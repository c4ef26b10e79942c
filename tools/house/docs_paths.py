"""Paths and names that the documentation mentions must exist: an untested map rots."""

import re
from pathlib import Path
from urllib.parse import unquote

from house.shell import ROOT, tracked_files

# A word in backticks that begins like this is a path of ours. `path::name` also wants that name in the file.
OURS = ("crates/", "python/", "guests/", "tests/", "fuzz/", "docs/", "tools/", ".ci/")
IN_BACKTICKS = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Not in the tree but named rightly: what a build or the user makes.
MADE = ("python/ringzero/images/builtin",)


def check() -> list[str]:
    """Return every path that docs, README and their like name and that is not there."""
    found: list[str] = []
    for page in (path for path in tracked_files() if path.suffix == ".md"):
        text = (ROOT / page).read_text()
        # Blocks of code show commands and their output, not our paths.
        prose = re.sub(
            r"^( *)```.*?^\1```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S
        )
        for number, line in enumerate(prose.splitlines(), 1):
            for said in IN_BACKTICKS.findall(line):
                complaint = missing(said)
                if complaint:
                    found.append(f"{page}:{number}: {complaint}")
            for target in LINK.findall(line):
                complaint = broken(page, target)
                if complaint:
                    found.append(f"{page}:{number}: {complaint}")
    return found


def missing(said: str) -> str | None:
    """Return what is wrong with a word in backticks, or None."""
    path, _, name = said.partition("::")
    if not path.startswith(OURS) or " " in path or path.startswith(MADE):
        return None
    if any(mark in path for mark in "*?"):
        return None if any(ROOT.glob(path)) else f"nothing matches `{path}`"
    if not (ROOT / path).exists():
        return f"`{path}` does not exist"
    if name and (ROOT / path).is_file():
        last = name.rsplit("::", 1)[-1].removesuffix("()")
        if not re.search(rf"\b{re.escape(last)}\b", (ROOT / path).read_text(errors="replace")):
            return f"`{path}` has no `{last}`"
    return None


def broken(page: Path, target: str) -> str | None:
    """Return what is wrong with a relative link, or None."""
    if re.match(r"[a-z]+:|#", target):
        return None
    path = unquote(target.partition("#")[0])
    return None if (ROOT / page.parent / path).exists() else f"the link to {path} leads nowhere"
