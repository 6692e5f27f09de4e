"""Where an engine stands on another machine: ``HOST[:PORT]/[PATH/]model[:version][@profile]``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from zoo.artifacts.refs import Ref, is_model
from zoo.errors import ArtifactError

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)
GRAMMAR = "a remote is HOST[:PORT]/[PATH/]model[:version][@profile], such as registry.example.org/zoo/zoo-demo"


@dataclass(frozen=True)
class Address:
    """A parsed remote. ``scheme`` is http only on the loopback or when it was asked for."""

    scheme: str
    host: str  # with its port
    path: tuple[str, ...]  # repository components before the model
    ref: Ref

    @property
    def repository(self) -> str:
        return "/".join((*self.path, self.ref.model))

    def beside(self, model: str) -> str:
        """The repository of another model under the same path."""
        return "/".join((*self.path, model))

    def __str__(self) -> str:
        return "/".join((self.host, *self.path, str(self.ref)))

    @classmethod
    def parse(cls, text: str, plain_http: bool = False, model: str = "") -> Address:
        """Take a remote apart. With ``model`` the text may end before the model's name: ``zoo push`` knows it.

        Plain HTTP is for the loopback, and elsewhere only with ``plain_http``; ``https://`` in front insists on TLS.
        """
        scheme, found, rest = text.partition("://")
        if not found:
            scheme, rest = "", text
        host, _, names = rest.partition("/")
        where = f"remote {text!r}"
        if scheme not in ("", "http", "https") or not _HOST.fullmatch(host):
            raise ArtifactError(f"{where}: {host!r} is not a host; {GRAMMAR}")
        if not found and not (host == "localhost" or any(char in host for char in ".:")):
            raise ArtifactError(f"{where}: {host!r} looks like a name, not like a host: write it with a dot or a port; {GRAMMAR}")
        local = is_loopback(host)
        if scheme == "http" and not (local or plain_http):
            raise ArtifactError(
                f"{where}: plain HTTP is only for this machine, because passwords would be readable; use --plain-http if you must"
            )
        parts = names.strip("/").split("/") if names.strip("/") else []
        last = parts[-1].partition("@")[0].partition(":")[0] if parts else ""
        if model and last != model:
            parts.append(model)
        if not parts:
            raise ArtifactError(f"{where}: it names no model; {GRAMMAR}")
        for part in parts[:-1]:
            if not is_model(part):
                raise ArtifactError(f"{where}: {part!r} is not lower-case letters, digits and single . _ - between; {GRAMMAR}")
        return cls(scheme or ("http" if local or plain_http else "https"), host.lower(), tuple(parts[:-1]), Ref.parse(parts[-1]))


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine by its very name."""
    name = host[1 : host.index("]")] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
