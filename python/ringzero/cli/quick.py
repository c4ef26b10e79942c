"""The short way to a running guest: `ringzero run ...` read without typer.

typer with pydantic takes 120 ms to load and 25 MB to keep, a good part of what a whole boot may take. So the
common forms of `ringzero run` are read here, in microseconds. Whatever is not entirely plain (help, an
unknown option, a value that is missing or no number) is left to typer, which knows how to explain it: this
file has no message of its own. A test holds the two to the same options and the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# option -> (field of RunOptions, how to read its value; None for a switch)
OPTIONS: dict[str, tuple[str, Callable[[str], Any] | None]] = {
    "--kernel": ("kernel", str),
    "--initrd": ("initrd", str),
    "--append": ("append", str),
    "--memory": ("memory", str),
    "--cpus": ("cpus", int),
    "--engine": ("engine", str),
    "--cpu": ("cpu", str),
    "--kaslr": ("kaslr", None),
    "--virtio": ("virtio", str),
    "--timeout": ("timeout", float),
    "--tty": ("tty", None),
    "-t": ("tty", None),
    "--env": ("env", str),
    "-e": ("env", str),
    "--device": ("device", str),
    "--disk": ("disk", str),
    "--mount": ("mount", str),
    "--vsock": ("vsock", str),
    "--net": ("net", str),
    "--publish": ("publish", str),
    "-p": ("publish", str),
    "--persist": ("persist", str),
    "--user": ("user", str),
    "--ssh-key": ("ssh_key", str),
    "--hostname": ("hostname", str),
    "--user-data": ("user_data", str),
    "--cwd": ("cwd", str),
    "-w": ("cwd", str),
    "--stats": ("stats", None),
    "--trace": ("trace", str),
    "--no-translation-cache": ("no_translation_cache", None),
    "--verbose": ("verbose", None),
    "-v": ("verbose", None),
}
REPEATED = frozenset({"env", "device", "disk", "mount", "net", "publish", "ssh_key"})
"""Fields that collect every value that is given."""


def read_run(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Return the fields of RunOptions that `run ARGUMENTS` gives, or None when this is not for us to read."""
    if not arguments or arguments[0] != "run":
        return None
    words = list(arguments[1:])
    fields: dict[str, Any] = {}
    if "--" in words:
        at = words.index("--")
        fields["command"] = tuple(words[at + 1 :])
        del words[at:]
    words.reverse()
    while words:
        word = words.pop()
        if not word.startswith("-"):
            if not word or "image" in fields:
                return None
            fields["image"] = word
            continue
        name, equals, value = word.partition("=")
        if name not in OPTIONS or (equals and not name.startswith("--")):
            return None
        field, read = OPTIONS[name]
        if read is None:
            if equals:
                return None
            fields[field] = True
            continue
        if not equals:
            # A value that looks like an option may be a forgotten one: typer decides.
            if not words or words[-1].startswith("-"):
                return None
            value = words.pop()
        try:
            parsed = read(value)
        except ValueError:
            return None
        if field in REPEATED:
            fields[field] = (*fields.get(field, ()), parsed)
        else:
            fields[field] = parsed
    return fields


def unannounced_command(words: Sequence[str]) -> list[str] | None:
    """Return the guest's command that follows IMAGE without a `--` before it, or None when there is none."""
    image_seen = False
    at = 0
    while at < len(words):
        word = words[at]
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            if name not in OPTIONS:
                return None
            at += 1 if equals or OPTIONS[name][1] is None else 2
            continue
        if image_seen:
            return list(words[at:])
        image_seen = True
        at += 1
    return None
