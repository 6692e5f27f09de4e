"""REFs are read as written, and everything else is refused with the grammar."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.artifacts.refs import Ref
from zoo.errors import ArtifactError

MODELS = st.from_regex(r"[a-z0-9]{1,8}(?:(?:\.|_|__|-{1,3})[a-z0-9]{1,8}){0,3}", fullmatch=True)
TAGS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
PROFILES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,40}", fullmatch=True)
DIGESTS = st.from_regex(r"sha256:[0-9a-f]{6,64}", fullmatch=True)


@given(MODELS, st.just("") | TAGS, st.just("") | PROFILES | DIGESTS)
def test_what_is_written_is_read(model: str, version: str, end: str) -> None:
    text = model + (f":{version}" if version else "") + (f"@{end}" if end else "")
    ref = Ref.parse(text)
    assert str(ref) == text
    assert (ref.model, ref.version, ref.digest or ref.profile) == (model, version, end)
    assert bool(ref.digest) == end.startswith("sha256:")


@given(st.text(max_size=40))
def test_any_text_is_a_ref_or_an_artifact_error(text: str) -> None:
    try:
        assert str(Ref.parse(text)) == text
    except ArtifactError as error:
        assert "model[:version][@profile]" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "@",
        "Model",
        "a/b",
        "../a",
        "a b",
        "a:",
        "a@",
        "a:b:c",
        "a:x y",
        "a@b@c",
        "a@sha256:12345",
        "a@sha256:xyzxyz",
        "a\n",
        "-a",
        "a-",
    ],
)
def test_malformed_refs(text: str) -> None:
    with pytest.raises(ArtifactError):
        Ref.parse(text)
