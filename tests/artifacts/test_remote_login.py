"""Logins, and servers that lie: what is sent to whom, and what is believed."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from artifact_engines import make_engine
from hypothesis import given
from hypothesis import strategies as st
from registry_server import QuietServer

from zoo.artifacts.layout import INDEX, Descriptor
from zoo.artifacts.machine import Machine
from zoo.artifacts.registry import Registry
from zoo.artifacts.remote import Address, pull, push
from zoo.artifacts.remote import client as client_module
from zoo.artifacts.remote.auth import Credentials, credentials_for, parse_challenge
from zoo.errors import ArtifactError, DigestError

CPU_MACHINE = Machine(2, 8 << 30, (), {"onnxruntime": "1.32.0"})
BASIC = "Basic " + base64.b64encode(b"me:secret").decode()
Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Seen:
    method: str
    path: str
    authorization: str


class Server:
    """An HTTP server whose answers are a function; it keeps what it was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[Seen], Reply] = lambda seen: (404, {}, b"")
        self.seen: list[Seen] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                seen = Seen(self.command, self.path, self.headers.get("Authorization", ""))
                server.seen.append(seen)
                status, headers, body = server.reply(seen)
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = answer

        self._server = QuietServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """A registry and another host."""
    pair = (Server(), Server())
    yield pair
    for server in pair:
        server.close()


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZOO_REGISTRY_USER", "me")
    monkeypatch.setenv("ZOO_REGISTRY_PASSWORD", "secret")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))
    monkeypatch.setattr(client_module, "BACKOFF", 0.001)


class Shelf:
    """A registry's read side over one local engine."""

    def __init__(self, tmp_path: Path) -> None:
        self.source = Registry(tmp_path / "source")
        self.entry = self.source.store(make_engine(tmp_path / "e"))
        self.layout = self.source.layout("tiny")
        self.index = self.layout.blob(self.layout.tags()["latest"].digest).read_bytes()
        self.override: dict[str, bytes] = {}

    def reply(self, seen: Seen) -> Reply:
        name = urlsplit(seen.path).path.rpartition("/")[2]
        if name in self.override:
            return 200, {}, self.override[name]
        if name in ("latest", self.entry.version):
            return 200, {"Content-Type": INDEX}, self.index
        path = self.layout.blobs / name.removeprefix("sha256:")
        return (200, {}, path.read_bytes()) if path.is_file() else (404, {}, b"")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def fetch(host: str, tmp_path: Path) -> Registry:
    target = Registry(tmp_path / "target")
    pull(target, f"{host}/tiny", machine=CPU_MACHINE)
    assert target.verify() == []
    return target


def bearer(shelf: Shelf, realm: str, scopes: list[str]) -> Callable[[Seen], Reply]:
    """A registry that wants a token from ``realm``; it is its own token server too."""

    def reply(seen: Seen) -> Reply:
        parts = urlsplit(seen.path)
        if parts.path == "/token":
            scopes.extend(parse_qs(parts.query)["scope"])
            return (200, {}, b'{"token": "t0ken", "expires_in": 300}') if seen.authorization in (BASIC, "") else (401, {}, b"")
        if seen.authorization != "Bearer t0ken":
            return 401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="reg",scope="repository:tiny:pull"'}, b""
        return shelf.reply(seen)

    return reply


def test_a_token_is_asked_for_once_and_used(servers: tuple[Server, Server], shelf: Shelf, tmp_path: Path) -> None:
    registry, _ = servers
    scopes: list[str] = []
    registry.reply = bearer(shelf, f"http://{registry.host}/token", scopes)
    fetch(registry.host, tmp_path)
    assert scopes == ["repository:tiny:pull"]
    assert [seen.authorization for seen in registry.seen if seen.path.startswith("/token")] == [BASIC]
    assert {seen.authorization for seen in registry.seen if seen.path.startswith("/v2/")} == {"", "Bearer t0ken"}


def test_a_token_that_expires_is_renewed(servers: tuple[Server, Server], shelf: Shelf, tmp_path: Path) -> None:
    registry, _ = servers
    asked = 0

    def reply(seen: Seen) -> Reply:
        nonlocal asked
        if seen.path.startswith("/token"):
            asked += 1
            return 200, {}, json.dumps({"access_token": f"t{asked}"}).encode()
        count = sum(one.path.startswith("/v2/") for one in registry.seen)
        if seen.authorization != f"Bearer t{asked}" or (count == 4 and asked == 1):
            return 401, {"WWW-Authenticate": f'Bearer realm="http://{registry.host}/token"'}, b""
        return shelf.reply(seen)

    registry.reply = reply
    fetch(registry.host, tmp_path)
    assert asked == 2


def test_the_password_is_not_sent_to_a_token_server_elsewhere(
    servers: tuple[Server, Server], shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = servers
    registry.reply = bearer(shelf, f"http://{other.host}/token", [])
    other.reply = lambda seen: (200, {}, b'{"token": "t0ken"}') if seen.authorization == BASIC else (401, {}, b"")
    with pytest.raises(ArtifactError, match=f"ZOO_REGISTRY_TOKEN_HOST={other.host}"):
        fetch(registry.host, tmp_path)
    assert [seen.authorization for seen in other.seen] == [""]
    monkeypatch.setenv("ZOO_REGISTRY_TOKEN_HOST", other.host)
    fetch(registry.host, tmp_path)
    assert other.seen[-1].authorization == BASIC


def test_an_anonymous_token_will_do_where_the_registry_gives_one(
    servers: tuple[Server, Server], shelf: Shelf, tmp_path: Path
) -> None:
    registry, other = servers
    registry.reply = bearer(shelf, f"http://{other.host}/token", [])
    other.reply = lambda seen: (200, {}, b'{"token": "t0ken"}')
    fetch(registry.host, tmp_path)
    assert {seen.authorization for seen in other.seen} == {""}


@pytest.mark.parametrize("kind", ["Basic", "Bearer"])
def test_blobs_may_lie_elsewhere_but_the_login_stays(
    servers: tuple[Server, Server], shelf: Shelf, tmp_path: Path, kind: str
) -> None:
    """As with registries that keep blobs in an object store."""
    registry, other = servers
    other.reply = shelf.reply
    inner = bearer(shelf, f"http://{registry.host}/token", [])

    def reply(seen: Seen) -> Reply:
        if kind == "Basic" and seen.authorization != BASIC:
            return 401, {"WWW-Authenticate": 'Basic realm="zoo"'}, b""
        if "/blobs/" in seen.path and seen.authorization:
            return 307, {"Location": f"http://{other.host}{seen.path}"}, b""
        return shelf.reply(seen) if kind == "Basic" else inner(seen)

    registry.reply = reply
    fetch(registry.host, tmp_path)
    assert len(other.seen) >= 5
    assert {seen.authorization for seen in other.seen} == {""}


def test_an_upload_address_elsewhere_gets_no_login(servers: tuple[Server, Server], shelf: Shelf) -> None:
    registry, other = servers

    def reply(seen: Seen) -> Reply:
        if seen.authorization != BASIC:
            return 401, {"WWW-Authenticate": "Basic"}, b""
        if seen.method == "POST":
            return 202, {"Location": f"http://{other.host}/upload?x=1"}, b""
        return 404, {}, b""

    registry.reply = reply
    other.reply = lambda seen: (401, {"WWW-Authenticate": "Basic"}, b"")
    with pytest.raises(ArtifactError, match="writing is not allowed"):
        push(shelf.source, "tiny", registry.host)
    assert other.seen and {seen.authorization for seen in other.seen} == {""}
    assert other.seen[0].path.startswith("/upload?x=1&digest=sha256")


def test_a_redirect_to_nowhere_in_particular_ends(servers: tuple[Server, Server], tmp_path: Path) -> None:
    registry, _ = servers
    registry.reply = lambda seen: (307, {"Location": seen.path}, b"")
    with pytest.raises(ArtifactError, match="without end"):
        fetch(registry.host, tmp_path)
    assert len(registry.seen) < 10
    registry.reply = lambda seen: (307, {"Location": "file:///etc/passwd"}, b"")
    with pytest.raises(ArtifactError, match="not an https address"):
        fetch(registry.host, tmp_path)


@pytest.mark.parametrize("name", ["engine.plan", "checkpoint/model.safetensors", "engine.json", "config", "manifest"])
def test_other_bytes_than_the_digest_says_are_refused(
    servers: tuple[Server, Server], shelf: Shelf, tmp_path: Path, name: str
) -> None:
    registry, _ = servers
    named = {**shelf.entry.image.files, "config": shelf.entry.image.config, "manifest": shelf.entry.descriptor}
    good = shelf.layout.blob(named[name].digest).read_bytes()
    target = Registry(tmp_path / "target")
    for bad in (bytes([good[0] ^ 1]) + good[1:], good + b"x", b"" if len(good) > 1 else b"xx"):
        shelf.override = {named[name].digest: bad}
        registry.reply = shelf.reply
        with pytest.raises((DigestError, ArtifactError), match=f"{named[name].digest}|stopped at byte"):
            pull(target, f"{registry.host}/tiny", machine=CPU_MACHINE)
        assert target.models() == []
    shelf.override = {}
    assert pull(target, f"{registry.host}/tiny", machine=CPU_MACHINE)[0].digest == shelf.entry.digest


def edited(data: bytes, change: Callable[[dict], object]) -> bytes:  # type: ignore[type-arg]
    document = json.loads(data)
    change(document)
    return json.dumps(document).encode()


BAD_INDEXES: dict[str, Callable[[dict], object]] = {  # type: ignore[type-arg]
    "schemaVersion": lambda d: d.update(schemaVersion=1),
    "media type": lambda d: d.update(mediaType="application/vnd.docker.distribution.manifest.list.v2+json"),
    "manifests": lambda d: d.update(manifests={}),
    "digest": lambda d: d["manifests"][0].update(digest="sha256:../../../../etc/passwd"),
    "md5": lambda d: d["manifests"][0].update(digest="md5:" + "0" * 32),
    "size": lambda d: d["manifests"][0].update(size=-1),
    "size is text": lambda d: d["manifests"][0].update(size="12"),
    "annotations": lambda d: d["manifests"][0].update(annotations={"zoo.model": 1}),
    "artifact type": lambda d: d["manifests"][0].update(artifactType="application/x-evil"),
    "not a manifest": lambda d: d["manifests"][0].update(mediaType="application/octet-stream"),
    "no annotations": lambda d: d["manifests"][0].update(annotations={}),
    "other model": lambda d: d["manifests"][0]["annotations"].update({"zoo.model": "other"}),
    "version": lambda d: d["manifests"][0]["annotations"].update({"zoo.version": "../x"}),
    "profile": lambda d: d["manifests"][0]["annotations"].update({"zoo.profile": "a/b"}),
    "sm": lambda d: d["manifests"][0]["annotations"].update({"zoo.sm": "9" * 30}),
    "empty": lambda d: d.update(manifests=[]),
    # sound in itself, and refused because engine.json says otherwise
    "lie about quant": lambda d: d["manifests"][0]["annotations"].update({"zoo.quant": "fp8"}),
    "lie about profile": lambda d: d["manifests"][0]["annotations"].update({"zoo.profile": "fp8-cpu-onnxruntime-tp1"}),
}


@pytest.mark.parametrize("what", BAD_INDEXES)
def test_a_malformed_index_is_refused(servers: tuple[Server, Server], shelf: Shelf, tmp_path: Path, what: str) -> None:
    registry, _ = servers
    shelf.override = {"latest": edited(shelf.index, BAD_INDEXES[what])}
    registry.reply = shelf.reply
    with pytest.raises(ArtifactError):
        fetch(registry.host, tmp_path)
    assert not (tmp_path / "target" / "tiny" / "index.json").exists()


@pytest.mark.parametrize("data", [b"", b"not json", b"[]", b"null", b"[" * 100_000, b'{"schemaVersion": 2}', b"x" * (5 << 20)])
def test_what_is_no_index_at_all(servers: tuple[Server, Server], shelf: Shelf, tmp_path: Path, data: bytes) -> None:
    registry, _ = servers
    shelf.override = {"latest": data}
    registry.reply = shelf.reply
    with pytest.raises(ArtifactError):
        fetch(registry.host, tmp_path)


BAD_MANIFESTS: dict[str, Callable[[dict], object]] = {  # type: ignore[type-arg]
    "artifact type": lambda d: d.update(artifactType="application/vnd.example.evil"),
    "no artifact type": lambda d: d.pop("artifactType"),
    "config type": lambda d: d["config"].update(mediaType="application/vnd.oci.image.config.v1+json"),
    "layer type": lambda d: d["layers"][0].update(mediaType="application/vnd.oci.image.layer.v1.tar+gzip"),
    "no layers": lambda d: d.update(layers=[]),
    "no name": lambda d: d["layers"][1].pop("annotations"),
    "escape": lambda d: d["layers"][1]["annotations"].update({"org.cncf.model.filepath": "../../.bashrc"}),
    "absolute": lambda d: d["layers"][1]["annotations"].update({"org.cncf.model.filepath": "/etc/cron.d/x"}),
    "twice": lambda d: d["layers"].append(d["layers"][1]),
    "added": lambda d: d["layers"].append(d["layers"][1] | {"annotations": {"org.cncf.model.filepath": "extra"}}),
    "renamed": lambda d: d["layers"][1]["annotations"].update({"org.cncf.model.filepath": "renamed"}),
    "huge config": lambda d: d["config"].update(size=1 << 40),
}


@pytest.mark.parametrize("what", BAD_MANIFESTS)
def test_a_malformed_manifest_is_refused(servers: tuple[Server, Server], shelf: Shelf, tmp_path: Path, what: str) -> None:
    """Its digest is right: whoever wrote it wrote the index too."""
    registry, _ = servers
    from zoo.artifacts.layout import describe

    data = edited(shelf.layout.blob(shelf.entry.digest).read_bytes(), BAD_MANIFESTS[what])
    made = describe(data, "x")
    index = edited(shelf.index, lambda d: d["manifests"][0].update(digest=made.digest, size=made.size))
    shelf.override = {"latest": index, made.digest: data}
    registry.reply = shelf.reply
    with pytest.raises(ArtifactError):
        fetch(registry.host, tmp_path)
    assert not (tmp_path / "target" / "tiny" / "index.json").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Bearer realm="https://a/b",service="s",scope="x:y:z"',
            ("bearer", {"realm": "https://a/b", "service": "s", "scope": "x:y:z"}),
        ),
        ("Bearer realm=https://a, service=s", ("bearer", {"realm": "https://a", "service": "s"})),
        ('basic realm="a \\"b\\" c"', ("basic", {"realm": 'a "b" c'})),
        ("Negotiate abc", ("", {})),
        ("", ("", {})),
    ],
)
def test_challenges(text: str, expected: tuple[str, dict[str, str]]) -> None:
    assert parse_challenge([text]) == expected


@given(st.lists(st.text(max_size=60), max_size=3))
def test_any_challenge_is_parsed(headers: list[str]) -> None:
    assert parse_challenge(headers)[0] in ("", "basic", "bearer")


def test_the_password_never_shows() -> None:
    assert "secret" not in repr(Credentials("me", "secret", "env"))


@pytest.mark.parametrize(
    ("auths", "user"),
    [
        ({"r.example": {"auth": base64.b64encode(b"a:b").decode()}}, "a"),
        ({"https://r.example": {"auth": base64.b64encode(b"a:b:c").decode()}}, "a"),
        ({"https://r.example/v1/": {"auth": base64.b64encode(b"a:").decode()}}, "a"),
        ({"r.example": {}}, None),
        ({"other.example": {"auth": base64.b64encode(b"a:b").decode()}}, None),
        ({"evil-r.example": {"auth": base64.b64encode(b"a:b").decode()}}, None),
        ([], None),
    ],
)
def test_dockers_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auths: object, user: str | None) -> None:
    monkeypatch.delenv("ZOO_REGISTRY_USER")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    found = credentials_for("r.example")
    assert (found.user if found else None) == user


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"auths": {"r.example": {"auth": "%%%"}}}', '{"auths": {"r.example": {"auth": "YQ=="}}}']
)
def test_a_broken_docker_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv("ZOO_REGISTRY_USER")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        credentials_for("r.example")


@pytest.mark.parametrize(
    ("text", "scheme", "host", "repository"),
    [
        ("registry.example.org/zoo/tiny:v1@p", "https", "registry.example.org", "zoo/tiny"),
        ("localhost/tiny", "http", "localhost", "tiny"),
        ("127.0.0.1:5000/a/b/tiny", "http", "127.0.0.1:5000", "a/b/tiny"),
        ("[::1]:5000/tiny", "http", "[::1]:5000", "tiny"),
        ("https://localhost:5000/tiny", "https", "localhost:5000", "tiny"),
        ("127.0.0.1.example.org/tiny", "https", "127.0.0.1.example.org", "tiny"),
        ("localhost.example.org/tiny", "https", "localhost.example.org", "tiny"),
        ("10.0.0.1:5000/tiny", "https", "10.0.0.1:5000", "tiny"),
    ],
)
def test_plain_http_is_for_the_loopback(text: str, scheme: str, host: str, repository: str) -> None:
    address = Address.parse(text)
    assert (address.scheme, address.host, address.repository) == (scheme, host, repository)
    insecure = Address.parse(text, plain_http=True)
    assert insecure.scheme == ("https" if text.startswith("https") else "http")


def test_a_push_may_name_the_place_with_or_without_the_model() -> None:
    assert Address.parse("localhost/zoo", model="tiny").repository == "zoo/tiny"
    assert Address.parse("localhost/zoo/tiny", model="tiny").repository == "zoo/tiny"
    assert Address.parse("localhost:1", model="tiny").repository == "tiny"


def test_a_descriptor_is_written_as_it_is_read() -> None:
    one = Descriptor("a/b", "sha256:" + "0" * 64, 3, {"k": "v"}, "c/d")
    assert Descriptor.from_json(one.to_json(), "here") == one
