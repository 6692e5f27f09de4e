"""Logging in to a registry: Basic, and Bearer tokens as the distribution specification describes them.

A password goes to the host that the user named and to nobody else: not along a redirect, not to another host's upload
address, and not to a token server elsewhere unless ZOO_REGISTRY_TOKEN_HOST names it. Without that, a token is asked for
anonymously there.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from zoo.errors import ArtifactError

CONFIG_LIMIT = 1 << 20
_PARAMETER = re.compile(r'([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


@dataclass(frozen=True)
class Credentials:
    """A user and a password, and where they were found. The password never shows in a message."""

    user: str
    password: str = field(repr=False)
    source: str

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def credentials_for(host: str) -> Credentials | None:
    """The login for a host: ZOO_REGISTRY_USER and ZOO_REGISTRY_PASSWORD, else the ``auths`` of docker's config.json."""
    user, password = os.environ.get("ZOO_REGISTRY_USER"), os.environ.get("ZOO_REGISTRY_PASSWORD")
    if user and password is not None:
        return Credentials(user, password, "ZOO_REGISTRY_USER")
    path = Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser() / "config.json"
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise ArtifactError(f"{path}: larger than {CONFIG_LIMIT} bytes")
        auths: Any = json.loads(path.read_bytes()).get("auths", {})
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read as docker's configuration: {error}") from None
    for name, found in auths.items() if isinstance(auths, dict) else ():
        if name.partition("://")[2].partition("/")[0] == host or name.partition("/")[0] == host:
            return _decode(found, path, host)
    return None


def _decode(found: Any, path: Path, host: str) -> Credentials | None:
    text = found.get("auth", "") if isinstance(found, dict) else ""
    if not text:
        return None  # a credential helper holds it, and helpers are not run
    try:
        user, colon, password = base64.b64decode(text, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, TypeError):
        colon = ""
    if not colon:
        raise ArtifactError(f"{path}: the login for {host} is malformed; run `docker login {host}` again")
    return Credentials(user, password, str(path))


def parse_challenge(headers: list[str]) -> tuple[str, dict[str, str]]:
    """The scheme ("basic", "bearer" or "") and parameters of WWW-Authenticate headers; Bearer before Basic."""
    found: dict[str, dict[str, str]] = {}
    for header in headers:
        scheme, _, rest = header.strip().partition(" ")
        values = {key.lower(): re.sub(r"\\(.)", r"\1", quoted or plain) for key, quoted, plain in _PARAMETER.findall(rest)}
        found.setdefault(scheme.lower(), values)
    return next(((scheme, found[scheme]) for scheme in ("bearer", "basic") if scheme in found), ("", {}))


class Login:
    """Answers one registry's challenges and remembers the answers. ``fetch`` gets a URL with headers: the token request."""

    def __init__(self, scheme: str, host: str, fetch: Callable[[httpx.URL, dict[str, str]], Any]) -> None:
        self.scheme, self.host = scheme, host
        self.credentials = credentials_for(host)
        self._fetch = fetch
        self._headers: dict[str, str] = {}  # scope -> Authorization

    def header(self, scope: str) -> str:
        """The Authorization header to begin with; empty before the first challenge."""
        return self._headers.get(scope) or self._headers.get("*", "")

    def answer(self, challenge: list[str], scope: str) -> str:
        """Answer a 401. ArtifactError, in one line, when there is no answer or this one was refused already."""
        kind, values = parse_challenge(challenge)
        refused = self.header(scope)
        if kind == "basic":
            if not self.credentials:
                raise ArtifactError(self.wanted())
            if refused:
                raise ArtifactError(self.refused())
            self._headers["*"] = self.credentials.basic
        elif kind == "bearer":
            if refused and self._headers.pop(scope, None) is None:
                raise ArtifactError(self.refused())
            self._headers[scope] = "Bearer " + self._token(values, scope)
        else:
            raise ArtifactError(
                f"registry {self.host}: wants a login of an unknown kind ({', '.join(challenge)[:100] or 'none named'})"
            )
        return self.header(scope)

    def wanted(self) -> str:
        """What to say when a login is needed and there is none."""
        return (
            f"registry {self.host}: wants a login; set ZOO_REGISTRY_USER and ZOO_REGISTRY_PASSWORD, or run "
            f"`docker login {self.host}` (its config.json is read, credential helpers are not)"
        )

    def refused(self) -> str:
        """What to say when a login was refused."""
        if not self.credentials:
            return self.wanted()
        login = f"user {self.credentials.user!r} (from {self.credentials.source})"
        return f"registry {self.host}: refused the login of {login}; check user and password"

    def _token(self, values: dict[str, str], scope: str) -> str:
        try:
            realm = httpx.URL(values.get("realm", ""))
        except httpx.InvalidURL:
            realm = httpx.URL("")
        if realm.scheme not in ("http", "https") or (realm.scheme == "http" and self.scheme == "https"):
            raise ArtifactError(
                f"registry {self.host}: names the token server {str(realm)[:100]!r}, which is not an https address"
            )
        headers = {}
        authority = realm.netloc.decode()
        if self.credentials and authority in (self.host, os.environ.get("ZOO_REGISTRY_TOKEN_HOST")):
            headers["Authorization"] = self.credentials.basic
        query = {"service": values["service"]} if values.get("service") else {}
        data = self._fetch(realm.copy_merge_params(query | {"scope": scope}), headers)
        token = (data.get("token") or data.get("access_token")) if isinstance(data, dict) else None
        if data is None or not isinstance(token, str) or not token.isascii() or not token.isprintable():
            if self.credentials and not headers:
                raise ArtifactError(
                    f"registry {self.host}: its token server {authority} is another host and gives nothing without a login; "
                    f"if you trust it with your password, set ZOO_REGISTRY_TOKEN_HOST={authority}"
                )
            raise ArtifactError(self.refused())
        return token
