"""What a guest is told at its first boot: a user, SSH keys, a host name, data of the operator's.

A seed is a small disk, as cloud-init's NoCloud data source wants it (cloud-init 22.4, "NoCloud"): an ISO 9660 file
system labelled CIDATA with meta-data, user-data and vendor-data. debian-full has no cloud-init; its
ringzero-seed.service reads the file `ringzero` of the same disk, a line a fact, and runs user-data that is a script.
"""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringzero.errors import InputError

__all__ = ["SEED_WORD", "Seed"]

LABEL = "CIDATA"
SEED_WORD = "ringzero.seed"
"""On the kernel's command line: there is a seed to be read."""
# hostname(7): labels of letters, digits and hyphens, 253 characters in all; Linux takes 64.
HOST_NAME = re.compile(
    r"(?=.{1,64}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.I
)
# useradd(8), "CAVEATS": what Debian takes for a name.
USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
# sshd(8), "AUTHORIZED_KEYS FILE FORMAT": a key without options.
SSH_KEY = re.compile(r"(ssh|ecdsa|sk-ssh|sk-ecdsa)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\r\n]*)?")
USER_DATA_MAX = 1 << 20


@dataclass(frozen=True)
class Seed:
    """What a guest shall be made into when it first boots."""

    user: str | None = None
    """A user who may become root with sudo; root itself is locked."""
    ssh_keys: tuple[str, ...] = ()
    """Who may log in as that user over SSH, or as root when there is no user: lines of an authorized_keys file."""
    hostname: str | None = None
    user_data: bytes | None = None
    """What cloud-init takes, or a script that begins with #!."""

    def __post_init__(self) -> None:
        if self.user is not None and (not USER_NAME.fullmatch(self.user) or self.user == "root"):
            raise InputError(f"{self.user!r} cannot be a user: give letters in lower case, digits, - and _")
        if self.hostname is not None and not HOST_NAME.fullmatch(self.hostname):
            raise InputError(
                f"{self.hostname!r} cannot be a host name: give letters, digits, hyphens and dots"
            )
        for key in self.ssh_keys:
            if not SSH_KEY.fullmatch(key):
                raise InputError(
                    f"{key[:40]!r} is not an SSH public key: give a file like ~/.ssh/id_ed25519.pub"
                )

    @classmethod
    def parse(
        cls,
        user: str | None = None,
        ssh_keys: tuple[str, ...] = (),
        hostname: str | None = None,
        user_data: str | os.PathLike[str] | None = None,
    ) -> Seed | None:
        """Return the seed that the command line describes: keys or files with keys, and a file of user-data.

        None when there is nothing to tell. Raises InputError.
        """
        if user is None and not ssh_keys and hostname is None and user_data is None:
            return None
        keys = tuple(key for text in ssh_keys for key in _keys(text))
        data = _read(Path(user_data), "user-data") if user_data is not None else None
        return cls(user, keys, hostname, data)

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` takes, as JSON knows it."""
        data = None if self.user_data is None else base64.b64encode(self.user_data).decode()
        return {
            "user": self.user,
            "ssh_keys": list(self.ssh_keys),
            "hostname": self.hostname,
            "user_data": data,
        }

    @classmethod
    def from_json(cls, values: Any) -> Seed:
        """Return the seed that `as_json` made. Raises InputError for anything else."""
        try:
            keys, data = values.get("ssh_keys", []), values.get("user_data")
            texts = [values.get("user"), values.get("hostname"), data]
            if not isinstance(keys, list) or not all(isinstance(text, str) for text in keys):
                raise TypeError("keys are a list of texts")
            if not all(text is None or isinstance(text, str) for text in texts):
                raise TypeError("the others are texts")
            return cls(
                texts[0],
                tuple(keys),
                texts[1],
                None if data is None else base64.b64decode(data, validate=True),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"a seed is not {values!r:.60}: {error}") from error

    @property
    def needs_cloud_init(self) -> bool:
        """Whether there is user-data that is no script: debian-full cannot read it."""
        return self.user_data is not None and not self.user_data.startswith(b"#!")

    @property
    def instance(self) -> str:
        """What a guest with this seed is: cloud-init goes to work again when that changes, and so does debian-full."""
        from zlib import crc32

        return f"ringzero-{crc32(self.user_data or b'', crc32(self._facts().encode())):08x}"

    def image(self) -> bytes:
        """Return the disk."""
        from ringzero.images.iso9660 import iso9660

        return iso9660(LABEL, self.files())

    def files(self) -> dict[str, bytes]:
        """Return the files of the disk by name."""
        meta = {"instance-id": self.instance} | ({"local-hostname": self.hostname} if self.hostname else {})
        return {
            "meta-data": _yaml(meta),
            "user-data": self.user_data or b"",
            # What the operator's own user-data says goes before vendor-data.
            "vendor-data": b"#cloud-config\n" + _yaml(self._cloud_config()),
            "ringzero": f"instance {self.instance}\n{self._facts()}".encode(),
        }

    def _facts(self) -> str:
        """Say it for debian-full, a line a fact."""
        facts = [f"user {self.user}"] if self.user else []
        facts += [f"key {key}" for key in self.ssh_keys]
        facts += [f"hostname {self.hostname}"] if self.hostname else []
        return "".join(f"{fact}\n" for fact in facts)

    def _cloud_config(self) -> dict[str, object]:
        """Say the same in cloud-init's own terms."""
        config: dict[str, object] = {}
        if self.user:
            config["users"] = [
                {
                    "name": self.user,
                    "shell": "/bin/bash",
                    "sudo": "ALL=(ALL) NOPASSWD:ALL",
                    "groups": "sudo",
                    "lock_passwd": bool(self.ssh_keys),
                    "ssh_authorized_keys": list(self.ssh_keys),
                }
            ]
        elif self.ssh_keys:
            config |= {"disable_root": False, "ssh_authorized_keys": list(self.ssh_keys)}
        return config


def _yaml(value: dict[str, object] | dict[str, str]) -> bytes:
    """JSON is YAML (YAML 1.2.2, section 1.2), and needs no library."""
    return json.dumps(value).encode() + b"\n"


def _keys(text: str) -> list[str]:
    """Return the keys in a file, or the key that `text` is."""
    if SSH_KEY.fullmatch(text):
        return [text]
    lines = _read(Path(text).expanduser(), "SSH key").decode("utf-8", "replace").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise InputError(f"there is no SSH key in {text}")
    return keys


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(USER_DATA_MAX + 1)
    except OSError as error:
        raise InputError(f"the {what} {path} cannot be read: {error.strerror}") from error
    if len(data) > USER_DATA_MAX:
        raise InputError(f"the {what} {path} is longer than {USER_DATA_MAX >> 20} MiB")
    return data
