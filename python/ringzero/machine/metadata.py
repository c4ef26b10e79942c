"""Instance metadata as EC2 has it: what an instance may know of itself, by path.

`metadata_server.py` answers a guest's requests for it. Everything in the guest may read it, and nothing here is of the
host: names and addresses that the guest has anyhow, and what its operator wrote into its seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["InstanceMetadata", "instance_of"]

VERSIONS = ("1.0", "2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest")


def instance_of(name: str) -> str:
    """Return the instance that a machine of a name is, without a seed that says so: always the same."""
    return f"i-{hashlib.blake2b(name.encode(), digest_size=9, person=b'ringzero machin').hexdigest()[:17]}"


@dataclass(frozen=True)
class InstanceMetadata:
    """What an instance may know of itself."""

    instance_id: str
    hostname: str = "localhost"
    local_ipv4: str = ""
    mac: str = ""
    ssh_keys: tuple[str, ...] = ()
    user_data: bytes | None = None
    instance_type: str = "ringzero"
    more: Mapping[str, str] = field(default_factory=dict)
    """Other items by their paths below meta-data: "placement/region"."""

    def tree(self) -> dict[str, Any]:
        """Return what is below meta-data/, directories as dictionaries."""
        items = {
            "ami-id": "ami-ringzero",
            "ami-launch-index": "0",
            "hostname": self.hostname,
            "instance-id": self.instance_id,
            "instance-type": self.instance_type,
            "local-hostname": self.hostname,
            "local-ipv4": self.local_ipv4,
            "mac": self.mac,
            "placement/availability-zone": "local",
            "reservation-id": f"r-{self.instance_id}",
            **self.more,
        }
        if self.mac:
            card = f"network/interfaces/macs/{self.mac}"
            items |= {
                f"{card}/mac": self.mac,
                f"{card}/device-number": "0",
                f"{card}/local-ipv4s": self.local_ipv4,
            }
        tree: dict[str, Any] = {}
        for path, value in items.items():
            *folders, name = path.split("/")
            place = tree
            for folder in folders:
                place = place.setdefault(folder, {})
            if value:
                place[name] = value
        if self.ssh_keys:
            # A list whose entries look like "0=name", and a directory for each number.
            tree["public-keys"] = {
                str(number): {"openssh-key": key} for number, key in enumerate(self.ssh_keys)
            }
        return tree

    def answer(self, path: str) -> bytes | None:
        """Return what is at a path like /latest/meta-data/instance-id; None when there is nothing."""
        words = [word for word in path.split("/") if word]
        if not words:
            return "\n".join(VERSIONS).encode()
        version, *words = words
        if version not in VERSIONS:
            return None
        document = {
            "instanceId": self.instance_id,
            "instanceType": self.instance_type,
            "privateIp": self.local_ipv4,
        }
        top: dict[str, Any] = {
            "dynamic": {"instance-identity": {"document": json.dumps(document, indent=2)}},
            "meta-data": self.tree(),
        }
        if self.user_data is not None:
            top["user-data"] = self.user_data
        place: Any = top
        for word in words:
            if not isinstance(place, dict) or word not in place:
                return None
            place = place[word]
        if not isinstance(place, dict):
            return place if isinstance(place, bytes) else str(place).encode()
        if words == ["meta-data", "public-keys"]:
            return "\n".join(f"{number}=key-{number}" for number in place).encode()
        names = (name + "/" if isinstance(entry, dict) else name for name, entry in sorted(place.items()))
        return "\n".join(names).encode()
