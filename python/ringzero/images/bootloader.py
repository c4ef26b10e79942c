"""What a disk's own boot loader would start: its configuration, read as a list and not as the program that it may be.

A grub.cfg is a script, and GRUB would run it; what distributions write has a first entry with a `linux` line and an
`initrd` line in it, and that is what is looked for (GRUB manual 2.06, "linux" and "initrd" among its commands). Fedora
and its kin keep an entry a file (The Boot Loader Specification, "Type #1"). Whoever made the image wrote them: file
names are looked up inside the image only, and words are for its own kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

__all__ = ["Entry", "entry_of_grub", "entry_of_kernels", "newest_entry"]

KERNEL = re.compile(r"vmlinuz-?(.*)")
INITRDS = ("initrd.img-{}", "initrd-{}", "initramfs-{}.img", "initrd.img-{}.gz")
OUR_WORDS = re.compile(r"(console|earlyprintk|earlycon)=")
"""Words about consoles: there is one in our machines, and that is the kernel's own."""


@dataclass(frozen=True)
class Entry:
    """What is to be started. Paths are within the partition that the configuration is on."""

    kernel: str
    initrds: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    version: str = ""

    @property
    def command_line(self) -> str:
        """The words, without those that are about consoles."""
        return " ".join(word for word in self.words if not OUR_WORDS.match(word))

    @property
    def has_root(self) -> bool:
        """Whether the words say where the root is."""
        return any(word.startswith("root=") for word in self.words)


def _words(text: str) -> list[str]:
    """Split as a shell would, and leave out what only its variables would know."""
    import shlex

    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    return [word for word in words if "$" not in word]


def entry_of_grub(text: str) -> Entry | None:
    """Return the first entry of a grub.cfg; None when there is none, or when entries are files of their own."""
    entry: Entry | None = None
    for line in text.splitlines():
        command, _, rest = line.strip().partition(" " if "\t" not in line.strip() else "\t")
        if command in ("menuentry", "submenu") and entry is not None:
            break
        words = _words(rest)
        if command in ("linux", "linux16", "linuxefi") and words and entry is None:
            entry = Entry(_path(words[0]), words=tuple(words[1:]))
        elif (
            command in ("initrd", "initrd16", "initrdefi")
            and words
            and entry is not None
            and not entry.initrds
        ):
            entry = replace(entry, initrds=tuple(map(_path, words)))
    return entry


def newest_entry(texts: Iterable[str]) -> Entry | None:
    """Return the newest version's entry among files of loader/entries; a rescue entry only if there is no other."""
    entries = []
    for text in texts:
        fields: dict[str, list[str]] = {}
        for line in text.splitlines():
            name, _, value = line.strip().partition(" ")
            fields.setdefault(name, []).append(value.strip())
        kernel = _words(fields.get("linux", [""])[0])
        if not kernel:
            continue
        initrds = [path for value in fields.get("initrd", []) for path in _words(value)]
        words = [word for value in fields.get("options", []) for word in _words(value)]
        entries.append(
            Entry(
                _path(kernel[0]),
                tuple(map(_path, initrds)),
                tuple(words),
                fields.get("version", [""])[0],
            )
        )
    return max(entries, key=lambda entry: ("rescue" not in entry.kernel, _order(entry.version)), default=None)


def entry_of_kernels(folder: str, names: Iterable[str]) -> Entry | None:
    """Return the newest kernel among the files of a folder, with the initramfs of its version."""
    there = set(names)
    versions = {name: match[1] for name in there if (match := KERNEL.fullmatch(name))}
    if not versions:
        return None
    kernel = max(versions, key=lambda name: ("rescue" not in name, _order(versions[name])))
    initrd = next((name for form in INITRDS if (name := form.format(versions[kernel])) in there), None)
    if initrd is None and not versions[kernel] and "initrd.img" in there:
        initrd = "initrd.img"
    return Entry(f"{folder}/{kernel}", () if initrd is None else (f"{folder}/{initrd}",))


def _path(text: str) -> str:
    """Return a path within the partition: GRUB may have said which one it is on, as in (hd0,gpt1)/boot/vmlinuz."""
    return "/" + re.sub(r"^\([^)]*\)", "", text).lstrip("/")


def _order(version: str) -> list[tuple[int, str]]:
    """Return what versions are ordered by: numbers as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", version)]
