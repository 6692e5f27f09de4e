"""Pushing and pulling, judged by a real docker-registry and by skopeo."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from artifact_engines import GPU, make_engine
from registry_server import PASSWORD, USER, Fault, Proxy, RealRegistry, Request, need, running_registry

from zoo.artifacts.machine import Gpu, Machine
from zoo.artifacts.registry import Registry
from zoo.artifacts.remote import client as client_module
from zoo.artifacts.remote import pull, push
from zoo.errors import ArtifactError, DigestError, IncompatibleError, NotFoundError

CPU_MACHINE = Machine(2, 8 << 30, (), {"onnxruntime": "1.32.0"})
L40S = Machine(2, 8 << 30, (Gpu("L40S", 89, 48 << 30),), {"onnxruntime": "1.32.0", "tensorrt-rtx-cu13": "1.7.1.116"})


@pytest.fixture(scope="module")
def server() -> Iterator[RealRegistry]:
    with running_registry(login=False) as found:
        yield found


@pytest.fixture(scope="module")
def guarded() -> Iterator[RealRegistry]:
    """The same with a password."""
    with running_registry(login=True) as found:
        yield found


@pytest.fixture
def proxy(server: RealRegistry) -> Iterator[Proxy]:
    found = Proxy(server.host)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZOO_REGISTRY_USER", USER)
    monkeypatch.setenv("ZOO_REGISTRY_PASSWORD", PASSWORD)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))
    monkeypatch.setattr(client_module, "BACKOFF", 0.01)


@pytest.fixture
def here(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> Registry:
    """Another machine's registry."""
    return Registry(tmp_path / "there")


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """A path of the test's own in the shared server."""
    return "t" + hashlib.sha256(request.node.name.encode()).hexdigest()[:12]


def contents(registry: Registry, ref: str) -> dict[str, bytes]:
    with registry.open(ref, check=False, machine=CPU_MACHINE) as opened:
        return {str(path.relative_to(opened.folder)): path.read_bytes() for path in opened.folder.rglob("*") if path.is_file()}


def test_what_is_pushed_can_be_pulled(tmp_path: Path, guarded: RealRegistry, here: Registry, there: Registry, place: str) -> None:
    a = here.store(make_engine(tmp_path / "a"))
    b = here.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s"))
    remote = f"{guarded.host}/{place}"
    refs = push(here, "tiny", remote)
    assert refs == [f"{remote}/tiny:{entry.version}@{entry.profile}" for entry in (a, b)]
    got = [pull(there, ref)[0] for ref in refs]
    assert [(entry.ref, entry.digest) for entry in got] == [(entry.ref, entry.digest) for entry in (a, b)]
    for entry in (a, b):
        assert contents(there, entry.ref) == contents(here, entry.ref)
    assert there.verify() == []
    assert there.rows() == here.rows()


def test_each_machine_fetches_only_its_own_profile(
    tmp_path: Path, proxy: Proxy, here: Registry, there: Registry, place: str
) -> None:
    a = here.store(make_engine(tmp_path / "a", plan=b"for a CPU"))
    b = here.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s", plan=b"for a GPU"))
    push(here, "tiny", f"{proxy.host}/{place}")
    proxy.seen.clear()
    assert [entry.digest for entry in pull(there, f"{proxy.host}/{place}/tiny", machine=L40S)] == [b.digest]
    assert proxy.count("GET", a.image.files["engine.plan"].digest) == 0
    assert [row["profile"] for row in there.rows()] == [b.profile]
    shared = b.image.files["checkpoint/model.safetensors"].digest
    assert proxy.count("GET", shared) == 1
    assert [entry.digest for entry in pull(there, f"{proxy.host}/{place}/tiny", machine=CPU_MACHINE)] == [a.digest]
    assert proxy.count("GET", shared) == 1, "the checkpoint is here already"
    assert there.verify() == []
    with pytest.raises(IncompatibleError, match="no engine of"):
        pull(there, f"{proxy.host}/{place}/tiny", machine=Machine(2, 8 << 30, (), {}))


def test_everything_of_a_version(tmp_path: Path, server: RealRegistry, here: Registry, there: Registry, place: str) -> None:
    """An older build of a profile is sent when its digest is named, and stays the older one."""
    old = here.store(make_engine(tmp_path / "a", max_tokens=1))
    here.store(make_engine(tmp_path / "a", max_tokens=2))
    here.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s"))
    push(here, f"tiny@{old.digest}", f"{server.host}/{place}")
    assert len(push(here, "tiny", f"{server.host}/{place}")) == 2
    got = pull(there, f"{server.host}/{place}/tiny", everything=True)
    assert len(got) == 3
    assert there.rows() == here.rows()


def test_versions_are_found_by_name_by_head_and_as_the_latest(
    tmp_path: Path, server: RealRegistry, here: Registry, there: Registry, place: str
) -> None:
    old = here.store(make_engine(tmp_path / "a", seed="a"))
    new = here.store(make_engine(tmp_path / "b", seed="b"))
    remote = f"{server.host}/{place}/tiny"
    push(here, f"tiny:{new.version}", remote)
    push(here, f"tiny:{old.version}", remote)  # an older version does not become the latest
    assert pull(there, remote, machine=CPU_MACHINE)[0].version == new.version
    assert pull(there, f"{remote}:{old.version[:6]}", machine=CPU_MACHINE)[0].version == old.version
    assert pull(there, f"{remote}:{new.version}@{new.digest[:19]}")[0].digest == new.digest
    for missing in (":ffffff", ":nothing", f":{new.version}@none-none-none-tp1", f":{new.version}@sha256:ffffffff"):
        with pytest.raises(NotFoundError):
            pull(there, remote + missing, machine=CPU_MACHINE)
    with pytest.raises(NotFoundError):
        pull(there, f"{server.host}/{place}/other", machine=CPU_MACHINE)


def test_pushing_again_sends_nothing(tmp_path: Path, proxy: Proxy, here: Registry, place: str) -> None:
    here.store(make_engine(tmp_path / "a"))
    first = push(here, "tiny", f"{proxy.host}/{place}")
    assert proxy.count("PUT", "/blobs/uploads/") > 0
    proxy.seen.clear()
    assert push(here, "tiny", f"{proxy.host}/{place}") == first
    assert [one.method for one in proxy.seen if one.method not in ("GET", "HEAD") and "/manifests/latest" not in one.path] == []


def test_two_machines_publish_profiles_of_one_version(
    tmp_path: Path, server: RealRegistry, here: Registry, there: Registry, place: str
) -> None:
    a = here.store(make_engine(tmp_path / "a"))
    b = there.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s"))
    push(here, "tiny", f"{server.host}/{place}")
    push(there, "tiny", f"{server.host}/{place}")
    third = Registry(tmp_path / "third")
    assert {entry.digest for entry in pull(third, f"{server.host}/{place}/tiny", everything=True)} == {a.digest, b.digest}


def test_an_index_that_somebody_else_overwrites_is_mended(
    tmp_path: Path, proxy: Proxy, here: Registry, there: Registry, place: str
) -> None:
    """Between our read of the index and our write another machine publishes; in the end the index has both."""
    a = here.store(make_engine(tmp_path / "a"))
    b = there.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s"))
    other: list[list[str]] = []

    def fault(request: Request) -> None:
        if request.method == "PUT" and request.path.endswith(f"/manifests/{a.version}") and not other:
            other.append([])  # our write is on its way: now the other one comes first
            other[0] = push(there, "tiny", f"{proxy.host}/{place}")

    proxy.fault = fault  # type: ignore[assignment]
    push(here, "tiny", f"{proxy.host}/{place}")
    assert other and other[0]
    third = Registry(tmp_path / "third")
    assert {entry.digest for entry in pull(third, f"{proxy.host}/{place}/tiny", everything=True)} == {a.digest, b.digest}


def test_six_machines_publish_at_once(tmp_path: Path, server: RealRegistry, place: str) -> None:
    registries = [Registry(tmp_path / f"r{number}") for number in range(6)]
    wanted = {registry.store(make_engine(tmp_path / f"e{n}", max_tokens=n + 1)).digest for n, registry in enumerate(registries)}
    failures: list[BaseException] = []

    def publish(registry: Registry) -> None:
        try:
            push(registry, "tiny", f"{server.host}/{place}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=publish, args=(registry,)) for registry in registries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    got = pull(Registry(tmp_path / "reader"), f"{server.host}/{place}/tiny", everything=True)
    assert {entry.digest for entry in got} == wanted


def test_the_first_manifest_of_a_build_wins_there_too(
    tmp_path: Path, server: RealRegistry, here: Registry, there: Registry, place: str
) -> None:
    first = here.store(make_engine(tmp_path / "a", plan=b"one run"))
    second = there.store(make_engine(tmp_path / "b", plan=b"another run"))
    assert first.build == second.build and first.digest != second.digest
    push(here, "tiny", f"{server.host}/{place}")
    push(there, "tiny", f"{server.host}/{place}")
    got = pull(Registry(tmp_path / "third"), f"{server.host}/{place}/tiny", everything=True)
    assert [entry.digest for entry in got] == [first.digest]


def test_a_byte_flipped_on_the_servers_disk_is_refused(
    tmp_path: Path, server: RealRegistry, here: Registry, there: Registry, place: str
) -> None:
    entry = here.store(make_engine(tmp_path / "a", plan=b"a plan nobody else has" * 100))
    push(here, "tiny", f"{server.host}/{place}")
    for name in ("engine.plan", "engine.json"):
        digest = entry.image.files[name].digest
        path = server.blob(digest)
        good = path.read_bytes()
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        with pytest.raises(DigestError) as caught:
            pull(there, f"{server.host}/{place}/tiny", machine=CPU_MACHINE)
        assert digest in str(caught.value) and name in str(caught.value)
        assert there.entries() == [] if there.models() else True
        path.write_bytes(good)
    assert pull(there, f"{server.host}/{place}/tiny", machine=CPU_MACHINE)[0].digest == entry.digest
    assert there.verify() == []


def test_a_manifest_changed_on_the_servers_disk_is_refused(
    tmp_path: Path, server: RealRegistry, here: Registry, there: Registry, place: str
) -> None:
    entry = here.store(make_engine(tmp_path / "a", max_tokens=77))
    push(here, "tiny", f"{server.host}/{place}")
    path = server.blob(entry.digest)
    path.write_bytes(path.read_bytes().replace(b'"tokenizer/LICENSE"', b'"tokenizer/LICENCE"'))
    with pytest.raises(ArtifactError):  # docker-registry notices it itself; otherwise we do
        pull(there, f"{server.host}/{place}/tiny", machine=CPU_MACHINE)
    assert there.models() == []


def test_a_damaged_local_blob_is_not_sent(tmp_path: Path, proxy: Proxy, here: Registry, place: str) -> None:
    entry = here.store(make_engine(tmp_path / "a", plan=b"will be damaged"))
    digest = entry.image.files["engine.plan"].digest
    path = here.layout("tiny").blob(digest)
    path.chmod(0o644)
    path.write_bytes(b"will be dAmaged")
    with pytest.raises(DigestError, match=digest):
        push(here, "tiny", f"{proxy.host}/{place}")
    assert proxy.count("PUT", "/manifests/") == 0


@pytest.mark.parametrize("where", ["in the middle", "at the start", "at the end"])
def test_a_pull_that_is_cut_off_goes_on_where_it_stopped(
    tmp_path: Path, proxy: Proxy, here: Registry, there: Registry, place: str, where: str
) -> None:
    plan = os.urandom(300_000)
    entry = here.store(make_engine(tmp_path / "a", plan=plan))
    digest = entry.image.files["engine.plan"].digest
    push(here, "tiny", f"{proxy.host}/{place}")
    cut = {"in the middle": 120_000, "at the start": 0, "at the end": 299_999}[where]
    proxy.fault = lambda request: Fault(cut_answer=cut) if digest in request.path and request.number == 1 else None
    proxy.seen.clear()
    pull(there, f"{proxy.host}/{place}/tiny", machine=CPU_MACHINE)
    ranges = [one.headers.get("Range") for one in proxy.seen if one.method == "GET" and digest in one.path]
    assert ranges == [None, f"bytes={cut}-" if cut else None]
    assert contents(there, entry.ref)["engine.plan"] == plan


def test_the_next_pull_goes_on_where_a_broken_one_gave_up(
    tmp_path: Path, proxy: Proxy, here: Registry, there: Registry, place: str
) -> None:
    plan = os.urandom(300_000)
    entry = here.store(make_engine(tmp_path / "a", plan=plan))
    digest = entry.image.files["engine.plan"].digest
    push(here, "tiny", f"{proxy.host}/{place}")
    proxy.fault = lambda request: (
        None if digest not in request.path else Fault(cut_answer=100_000) if "Range" not in request.headers else Fault(status=503)
    )
    with pytest.raises(ArtifactError, match=r"stopped at byte 100000 of 300000 .*pull again to go on"):
        pull(there, f"{proxy.host}/{place}/tiny", machine=CPU_MACHINE)
    assert there.rows() == []
    proxy.fault = lambda request: None
    proxy.seen.clear()
    pull(there, f"{proxy.host}/{place}/tiny", machine=CPU_MACHINE)
    assert [one.headers.get("Range") for one in proxy.seen if digest in one.path] == ["bytes=100000-"]
    assert contents(there, entry.ref)["engine.plan"] == plan
    assert not any((there.root / "tiny" / ".zoo" / "partial").iterdir())


def test_what_is_left_of_a_broken_pull_is_not_trusted(
    tmp_path: Path, server: RealRegistry, here: Registry, there: Registry, place: str
) -> None:
    plan = os.urandom(50_000)
    entry = here.store(make_engine(tmp_path / "a", plan=plan))
    push(here, "tiny", f"{server.host}/{place}")
    partial = there.root / "tiny" / ".zoo" / "partial" / entry.image.files["engine.plan"].digest.removeprefix("sha256:")
    for rubbish in (b"x" * 1000, b"y" * 50_000, b"z" * 60_000):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(rubbish)
        pull(there, f"{server.host}/{place}/tiny", machine=CPU_MACHINE)
        assert contents(there, entry.ref)["engine.plan"] == plan
        there.remove("tiny")
        there.gc()
        assert not partial.exists()


def test_a_push_that_is_cut_off_goes_on(
    tmp_path: Path, proxy: Proxy, here: Registry, there: Registry, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of 64 kB: the connection is lost within one, the answer to one is lost, one is answered with 503."""
    monkeypatch.setattr("zoo.artifacts.remote.sending.CHUNK", 65_536)
    monkeypatch.setattr("zoo.artifacts.remote.sending.SMALL", 1000)
    plan = os.urandom(400_000)
    entry = here.store(make_engine(tmp_path / "a", plan=plan))
    faults = {2: Fault(cut_request=30_000), 4: Fault(lose_answer=True), 6: Fault(status=503)}
    patches = 0

    def fault(request: Request) -> Fault | None:
        nonlocal patches
        large = request.method == "PATCH" and int(request.headers.get("Content-Length", 0)) == 65_536
        patches += large
        return faults.pop(patches, None) if large else None

    proxy.fault = fault
    push(here, "tiny", f"{proxy.host}/{place}")
    assert not faults, "every fault must have happened"
    pull(there, f"{proxy.host}/{place}/tiny", machine=CPU_MACHINE)
    assert contents(there, entry.ref)["engine.plan"] == plan


def test_the_lost_answer_to_the_last_request_of_an_upload(tmp_path: Path, proxy: Proxy, here: Registry, place: str) -> None:
    here.store(make_engine(tmp_path / "a", plan=os.urandom(1000)))
    lost = []

    def fault(request: Request) -> Fault | None:
        if request.method == "PUT" and "digest=" in request.path and not lost:
            lost.append(request)
            return Fault(lose_answer=True)
        return None

    proxy.fault = fault
    assert push(here, "tiny", f"{proxy.host}/{place}")
    assert lost


def test_a_blob_that_a_neighbour_has_is_mounted(
    tmp_path: Path, proxy: Proxy, here: Registry, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.artifacts.remote.sending.MOUNT_FROM", 100)
    checkpoint = os.urandom(5000)
    here.store(make_engine(tmp_path / "a", checkpoint=checkpoint))
    entry = here.store(make_engine(tmp_path / "b", model="other", checkpoint=checkpoint))
    push(here, "tiny", f"{proxy.host}/{place}")
    proxy.seen.clear()
    push(here, "other", f"{proxy.host}/{place}")
    digest = entry.image.files["checkpoint/model.safetensors"].digest
    assert proxy.count("POST", f"mount={digest}&from={place}/tiny") == 1
    assert not any(one.method in ("PATCH", "PUT") and int(one.headers.get("Content-Length", 0)) == 5000 for one in proxy.seen)
    assert pull(Registry(tmp_path / "there"), f"{proxy.host}/{place}/other", machine=CPU_MACHINE)[0].digest == entry.digest


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_in_trouble_is_asked_again_a_few_times(
    tmp_path: Path, proxy: Proxy, here: Registry, place: str, status: int
) -> None:
    here.store(make_engine(tmp_path / "a"))
    left = dict.fromkeys(("GET", "HEAD", "POST", "PUT"), 2)

    def fault(request: Request) -> Fault | None:
        left[request.method] -= 1
        return Fault(status=status) if left[request.method] >= 0 else None

    proxy.fault = fault
    assert push(here, "tiny", f"{proxy.host}/{place}")
    proxy.seen.clear()
    proxy.fault = lambda request: Fault(status=status, body=b'{"errors": [{"code": "BUSY", "message": "come back later"}]}')
    with pytest.raises(ArtifactError, match=f"HTTP {status} BUSY come back later"):
        pull(Registry(tmp_path / "there"), f"{proxy.host}/{place}/tiny", machine=CPU_MACHINE)
    assert len(proxy.seen) == client_module.ATTEMPTS


@pytest.mark.parametrize("what", ["push", "pull"])
def test_a_wrong_password_gives_one_clear_line(
    tmp_path: Path, guarded: RealRegistry, here: Registry, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    here.store(make_engine(tmp_path / "a"))
    monkeypatch.setenv("ZOO_REGISTRY_PASSWORD", "wrong secret")
    with pytest.raises(ArtifactError) as caught:
        push(here, "tiny", f"{guarded.host}/x") if what == "push" else pull(here, f"{guarded.host}/x/tiny")
    text = str(caught.value)
    assert (
        text == f"registry {guarded.host}: refused the login of user '{USER}' (from ZOO_REGISTRY_USER); check user and password"
    )
    assert "wrong secret" not in text
    monkeypatch.delenv("ZOO_REGISTRY_USER")
    with pytest.raises(ArtifactError, match="wants a login; set ZOO_REGISTRY_USER"):
        push(here, "tiny", f"{guarded.host}/x") if what == "push" else pull(here, f"{guarded.host}/x/tiny")


def test_dockers_login_is_used(
    tmp_path: Path, guarded: RealRegistry, here: Registry, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64

    monkeypatch.delenv("ZOO_REGISTRY_USER")
    here.store(make_engine(tmp_path / "a"))
    config = tmp_path / "docker" / "config.json"
    config.parent.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(config.parent))
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    config.write_text(json.dumps({"auths": {guarded.host: {"auth": auth}}}))
    assert push(here, "tiny", f"{guarded.host}/{place}")
    config.write_text(json.dumps({"auths": {"127.0.0.1:1": {"auth": auth}}}))
    with pytest.raises(ArtifactError, match="wants a login"):
        push(here, "tiny", f"{guarded.host}/{place}")


def test_nobody_answers(here: Registry, tmp_path: Path) -> None:
    here.store(make_engine(tmp_path / "a"))
    with pytest.raises(ArtifactError, match=r"registry 127\.0\.0\.1:1: no answer"):
        push(here, "tiny", "127.0.0.1:1/zoo")


def skopeo(*arguments: str) -> None:
    done = subprocess.run(["skopeo", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_skopeo_copies_our_layout_out_and_back(
    tmp_path: Path, guarded: RealRegistry, here: Registry, there: Registry, place: str
) -> None:
    """Layout -> registry -> layout by skopeo alone; digests are equal and what came back opens."""
    need("skopeo")
    entries = [here.store(make_engine(tmp_path / "a")), here.store(make_engine(tmp_path / "b", quant="fp8", hardware="l40s"))]
    version = entries[0].version
    login = f"--{{}}-creds={USER}:{PASSWORD}"
    remote = f"docker://{guarded.host}/{place}/tiny:{version}"
    skopeo(
        "copy",
        "--all",
        "--preserve-digests",
        "--dest-tls-verify=false",
        login.format("dest"),
        f"oci:{here.root}/tiny:{version}",
        remote,
    )
    back = there.root / "tiny"
    back.parent.mkdir(parents=True)
    skopeo("copy", "--all", "--preserve-digests", "--src-tls-verify=false", login.format("src"), remote, f"oci:{back}:{version}")
    assert there.layout("tiny").tags()[version].digest == here.layout("tiny").tags()[version].digest
    assert there.rows() == here.rows()
    assert there.verify() == []
    assert contents(there, entries[0].ref) == contents(here, entries[0].ref)
    assert (
        pull(Registry(tmp_path / "third"), f"{guarded.host}/{place}/tiny:{version}", machine=CPU_MACHINE)[0].digest
        == entries[0].digest
    )


def test_skopeo_reads_what_we_push(tmp_path: Path, guarded: RealRegistry, here: Registry, there: Registry, place: str) -> None:
    need("skopeo")
    entry = here.store(make_engine(tmp_path / "a"))
    push(here, "tiny", f"{guarded.host}/{place}")
    target = there.root / "tiny"
    target.parent.mkdir(parents=True)
    login = f"--src-creds={USER}:{PASSWORD}"
    skopeo(
        "copy",
        "--all",
        "--src-tls-verify=false",
        login,
        f"docker://{guarded.host}/{place}/tiny:{entry.version}",
        f"oci:{target}:{entry.version}",
    )
    assert there.entries() == [entry.__class__.read(there.layout("tiny"), entry.version, entry.descriptor)]
    tag = f"{entry.version}.{entry.profile}.{entry.build.removeprefix('sha256:')[:8]}"
    skopeo("inspect", "--raw", "--tls-verify=false", login.replace("--src-", "--"), f"docker://{guarded.host}/{place}/tiny:{tag}")


def test_names_of_places(here: Registry, tmp_path: Path) -> None:
    here.store(make_engine(tmp_path / "a", needs=GPU, hardware="l40s"))
    for to, message in (
        ("tiny", "looks like a name"),
        ("zoo/tiny", "looks like a name"),
        ("a_b.c/x", "is not a host"),
        ("ftp://h.example/x", "is not a host"),
        ("http://registry.example.org/x", "plain HTTP is only for this machine"),
        ("127.0.0.1:5000/Up", "lower-case"),
        ("127.0.0.1:5000/x/../tiny", "lower-case"),
        ("127.0.0.1:5000/tiny:v1", "name just a place"),
    ):
        with pytest.raises(ArtifactError, match=message):
            push(here, "tiny", to)
    with pytest.raises(ArtifactError, match="names no model"):
        pull(here, "127.0.0.1:5000/")
