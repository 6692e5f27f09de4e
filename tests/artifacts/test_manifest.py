"""engine.json comes from anywhere: it is rebuilt as it was written, or refused with the field that is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from artifact_engines import make_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.artifacts.manifest import FIELDS, EngineManifest
from zoo.errors import ArtifactError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    manifest = make_engine(tmp_path_factory.mktemp("e")).manifest
    return dict(json.loads(json.dumps(manifest.to_json())))


def test_a_manifest_survives_json(tmp_path: Path) -> None:
    manifest = make_engine(tmp_path).manifest
    assert EngineManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_every_field_has_a_description() -> None:
    assert set(FIELDS) == set(EngineManifest.__dataclass_fields__)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema is 2; this version reads 1"),
        ("model", 7, "model is 7; expected text"),
        ("made", [], "made is a list; expected an object"),
        ("needs.kind", "tpu", "needs.kind is 'tpu'; expected cpu or gpu"),
        ("needs.sm", "89", "needs.sm is '89'; expected a whole number"),
        ("needs.sm", True, "needs.sm is True; expected a whole number"),
        ("needs.memory", -1, "needs.memory is -1; expected a number from 0 on"),
        ("needs.packages", {"onnxruntime": 1}, "needs.packages.onnxruntime is 1; expected text"),
        ("spec.parallel", {"tp": "2"}, "spec.parallel.tp is '2'"),
        ("limits", {"max_tokens": 1.5}, "limits.max_tokens is 1.5; expected a whole number"),
        ("abi.inputs", {}, "abi.inputs is a dict; expected a list"),
        ("abi.inputs", [{"name": "x", "dtype": "int32"}], r"abi.inputs\[0\] has name, dtype; expected name, dtype and shape"),
        ("abi.inputs", [{"name": "x", "dtype": "int32", "shape": [-1]}], r"the shape of abi.inputs\[0\] is \[-1\]"),
        ("abi.caches", [{"name": "x", "dtype": "f", "shape": ["T"], "group": "full"}], r"abi.caches\[0\].shape\[0\] is 'T'"),
        ("weights.files", [{"digest": "x"}], "weights.files has no name"),
        ("passes", [{"name": "x", "counts": {"a": "b"}}], r"passes\[0\].counts.a is 'b'"),
        ("files", {"x": {"size": 1}}, "files.x has no digest"),
        ("seconds", float("inf"), "seconds is inf"),
        ("surprise", 1, "unknown fields surprise"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], path: str, value: Any, message: str) -> None:
    bad = copy.deepcopy(data)
    *folders, name = path.split(".")
    place = bad
    for folder in folders:
        place = place[folder]
    place[name] = value
    with pytest.raises(ArtifactError, match=message):
        EngineManifest.from_json(bad)


@pytest.mark.parametrize("name", ["model", "made", "abi", "needs", "limits", "spec"])
def test_a_missing_field_is_named(data: dict[str, Any], name: str) -> None:
    with pytest.raises(ArtifactError, match=f"no field {name}"):
        EngineManifest.from_json({key: value for key, value in data.items() if key != name})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_anything_anywhere_is_refused_or_understood(data: dict[str, Any], draw: st.DataObject) -> None:
    """One value of a manifest is replaced by any JSON: ArtifactError or a manifest, never another exception."""
    bad = copy.deepcopy(data)
    place: Any = bad
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and draw.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = draw.draw(JSON)
        break
    try:
        EngineManifest.from_json(bad)
    except ArtifactError as error:
        assert str(error).startswith("engine.json: ")


@given(JSON)
def test_anything_at_all(value: Any) -> None:
    with pytest.raises(ArtifactError):
        EngineManifest.from_json(value)
