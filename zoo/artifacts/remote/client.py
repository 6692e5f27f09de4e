"""HTTP to one repository of one registry (OCI distribution specification 1.1): logins, redirects, retries, limits."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from zoo.artifacts.layout import DOCUMENT_LIMIT, INDEX, MANIFEST
from zoo.artifacts.remote.address import Address, is_loopback
from zoo.artifacts.remote.auth import Login
from zoo.errors import ArtifactError, NotFoundError

TIMEOUT = httpx.Timeout(60.0, connect=10.0)  # seconds: of one read or write, not of a transfer
ATTEMPTS = 5
BACKOFF = 0.4  # seconds; doubles with each attempt
LONGEST_WAIT = 20.0
RETRIED = (429, 500, 502, 503, 504)
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
MOST_TAG_PAGES = 100

Body = bytes | Callable[[], Iterable[bytes]]  # all of it, or what starts it from the beginning


@dataclass(frozen=True)
class Answer:
    """An answer that was read whole. ``next``: where its Link header says a list goes on."""

    status: int
    headers: httpx.Headers
    content: bytes
    url: httpx.URL
    next: str = ""


class Client:
    """One repository. A context manager; not thread-safe."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.root = httpx.URL(f"{address.scheme}://{address.host}/v2/")
        self.base = self.root.join(f"{address.repository}/")
        self.http = httpx.Client(
            timeout=TIMEOUT, trust_env=not is_loopback(address.host), headers={"Accept-Encoding": "identity"}
        )
        self.login = Login(address.scheme, address.host, self._token)

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- requests ----------------------------------------------------------------------------------------------------

    def send(
        self,
        method: str,
        url: str | httpx.URL,
        *,
        headers: dict[str, str] | None = None,
        body: Body | None = None,
        push: bool = False,
        attempts: int = ATTEMPTS,
        limit: int = DOCUMENT_LIMIT,
    ) -> Answer:
        """One request, its answer read whole (at most ``limit`` bytes). Statuses are the caller's to judge, 401 and 403 apart.

        Lost connections and the statuses in ``RETRIED`` are tried again, ``attempts`` times in all: callers give 1 where
        repeating a request would do something twice.
        """
        for attempt in range(attempts):
            try:
                with self._answer(method, url, headers or {}, body, push) as response:
                    if response.status_code not in RETRIED or attempt == attempts - 1:
                        return whole(response, limit, self.address.host)
                    wait = response.headers.get("Retry-After", "")
            except httpx.TransportError as error:
                if attempt == attempts - 1:
                    raise self.lost(error) from error
                wait = ""
            pause(attempt, wait)
        raise AssertionError("unreachable")

    @contextmanager
    def stream(self, url: str | httpx.URL, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """GET without reading the body. Raises httpx.TransportError: resuming is the caller's."""
        with self._answer("GET", url, headers, None, False) as response:
            yield response

    @contextmanager
    def _answer(
        self, method: str, url: str | httpx.URL, headers: dict[str, str], body: Body | None, push: bool
    ) -> Iterator[httpx.Response]:
        """Send a request, log in when asked, follow redirects of GET and HEAD. The password stays with the first host."""
        target = self.base.join(url)
        scope = f"repository:{self.address.repository}:{'pull,push' if push else 'pull'}"
        answered = False
        for _ in range(MOST_REDIRECTS + 2):
            if target.scheme not in ("http", "https") or (target.scheme == "http" and self.root.scheme == "https"):
                raise ArtifactError(
                    f"registry {self.address.host}: sends on to {str(target)[:100]!r}, which is not an https address"
                )
            ours = (target.scheme, target.netloc) == (self.root.scheme, self.root.netloc)
            sent = dict(headers)
            if ours and (authorization := self.login.header(scope)):
                sent["Authorization"] = authorization
            request = self.http.build_request(method, target, headers=sent, content=body() if callable(body) else body)
            response = self.http.send(request, stream=True)
            try:
                if response.status_code == 401 and ours:
                    challenge = response.headers.get_list("WWW-Authenticate")
                    if answered and "Authorization" in sent:
                        raise ArtifactError(self.login.refused())
                    self.login.answer(challenge, scope)
                    answered = True
                    continue
                if response.status_code in REDIRECTS and method in ("GET", "HEAD") and "Location" in response.headers:
                    target = target.join(response.headers["Location"])
                    continue
                if response.status_code in (401, 403):
                    said = problem(whole(response, DOCUMENT_LIMIT, self.address.host))
                    doing = "writing" if push else "reading"
                    raise ArtifactError(f"{self.address.host}/{self.address.repository}: {doing} is not allowed ({said})")
                yield response
                return
            finally:
                response.close()
        raise ArtifactError(f"registry {self.address.host}: sends from one address to the next without end")

    def _token(self, url: httpx.URL, headers: dict[str, str]) -> Any:
        """A token server's answer as JSON; None when it refuses."""
        for attempt in range(ATTEMPTS):
            try:
                with self.http.stream("GET", url, headers=headers) as response:
                    if response.status_code == 200:
                        return parse(whole(response, 1 << 20, url.host).content, f"token server {url.host}")
                    if response.status_code not in RETRIED or attempt == ATTEMPTS - 1:
                        return None
            except httpx.TransportError as error:
                if attempt == ATTEMPTS - 1:
                    raise ArtifactError(f"token server {url.host}: {error or type(error).__name__}") from None
            pause(attempt)
        raise AssertionError("unreachable")

    def lost(self, error: httpx.TransportError) -> ArtifactError:
        """What to say when the connection is lost for good."""
        text = str(error) or type(error).__name__
        return ArtifactError(
            f"registry {self.address.host}: no answer ({text}); is the address right, and is it {self.address.scheme}?"
        )

    # -- documents ---------------------------------------------------------------------------------------------------

    def manifest(self, name: str) -> bytes:
        """The bytes of the manifest or index under a tag or digest. NotFoundError when there is none."""
        response = self.send("GET", f"manifests/{name}", headers={"Accept": f"{INDEX}, {MANIFEST}"})
        if response.status == 404:
            raise NotFoundError(f"{self.address.host}/{self.address.repository}: there is no {name}")
        self.expect(response, 200, f"reading {name}")
        return response.content

    def put_manifest(self, name: str, data: bytes, media_type: str) -> None:
        """Store a manifest or index under a tag or digest. Repeating it does nothing twice."""
        response = self.send("PUT", f"manifests/{name}", headers={"Content-Type": media_type}, body=data, push=True)
        self.expect(response, 201, f"writing {name}")

    def tags(self) -> list[str]:
        """Every tag of the repository; none when there is no repository."""
        tags: list[str] = []
        url: str | httpx.URL = "tags/list?n=1000"
        for _ in range(MOST_TAG_PAGES):
            response = self.send("GET", url)
            if response.status == 404:
                return tags
            self.expect(response, 200, "listing tags")
            found = parse(response.content, f"registry {self.address.host}")
            names = found.get("tags") if isinstance(found, dict) else None
            tags += [name for name in names or () if isinstance(name, str)]
            if not response.next:
                return tags
            url = response.url.join(response.next)
        raise ArtifactError(f"registry {self.address.host}: more than {MOST_TAG_PAGES} pages of tags")

    def expect(self, answer: Answer, status: int, doing: str) -> None:
        """ArtifactError with the registry's own words when an answer is not the one that was hoped for."""
        if answer.status != status:
            raise ArtifactError(f"{self.address.host}/{self.address.repository}: {doing}: {problem(answer)}")


def whole(response: httpx.Response, limit: int, host: str) -> Answer:
    """Read an answer to its end; ArtifactError beyond ``limit`` bytes."""
    data = bytearray()
    for piece in response.iter_raw():
        data += piece
        if len(data) > limit:
            raise ArtifactError(f"registry {host}: answered with more than {limit} bytes where a small document belongs")
    following = response.links.get("next", {}).get("url", "")
    return Answer(response.status_code, response.headers, bytes(data), response.url, following)


def parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: answered with what is not JSON ({error})") from None


def problem(answer: Answer) -> str:
    """The status and the first of the registry's own messages, made safe to print."""
    text = f"HTTP {answer.status}"
    try:
        first = json.loads(answer.content)["errors"][0]
        said = f"{first.get('code', '')} {first.get('message', '')}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return text
    return f"{text} {''.join(char for char in said if char.isprintable())[:200].strip()}"


def pause(attempt: int, wait: str = "") -> None:
    """Wait before the next attempt: what the server asked for, or twice as long each time; spread, so that clients part."""
    seconds = float(wait) if wait.isdigit() else BACKOFF * 2**attempt
    time.sleep(min(LONGEST_WAIT, seconds * random.uniform(0.8, 1.3)))  # noqa: S311 - no secret
