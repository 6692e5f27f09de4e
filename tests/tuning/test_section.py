"""The tuning section: YAML that says what was found, merged into a profile without touching the rest of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from zoo.errors import ConfigError
from zoo.spec import HardwareSpec
from zoo.tuning.section import Section, differs, parse, read, write

ROOT = Path(__file__).parents[2]


def found() -> Section:
    made = Section()
    made.comments[()] = ["2026-11-26, NVIDIA H100: zoo tune llama"]
    made.add(("attention", "128x4.float8e4m3"), {"decode_block_n": 64, "decode_warps": 4}, "decode: 41.0 us (default 43.2)")
    made.add(("skinny", "6144x4096.float8e4m3"), {"16": [16, 64, 128, 4, 4, 4]}, "M=1 12.0 us", "M=16 12.2 us")
    made.add(("skinny", "128256x4096.bfloat16"), {})
    made.add(("rotary_elements",), 2048, "rotary: 3.1 us (default 3.3)")
    return made


def test_it_is_yaml_with_what_was_found() -> None:
    text = found().text()
    assert yaml.safe_load(text) == {"tuning": found().data}
    assert found().data == {
        "attention": {"128x4.float8e4m3": {"decode_block_n": 64, "decode_warps": 4}},
        "skinny": {"6144x4096.float8e4m3": {"16": [16, 64, 128, 4, 4, 4]}, "128256x4096.bfloat16": {}},
        "rotary_elements": 2048,
    }
    assert "# 2026-11-26, NVIDIA H100" in text and "    # M=16 12.2 us\n" in text
    assert yaml.safe_load(Section().text()) == {"tuning": {}}


def test_it_is_read_as_it_was_written() -> None:
    again = parse(found().text().splitlines(), "x")
    assert again.data == found().data and again.comments == {(("skinny", "128256x4096.bfloat16")): [], **found().comments}
    assert again.text() == found().text()
    assert parse(Section().text().splitlines(), "x").data == {}


@pytest.mark.parametrize("profile", sorted((ROOT / "conf" / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_profile_keeps_everything_else(profile: Path, tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(profile.read_text())
    before = yaml.safe_load(file.read_text())
    written = write(file, found())
    after = yaml.safe_load(file.read_text())
    assert {key: value for key, value in after.items() if key != "tuning"} == {
        key: value for key, value in before.items() if key != "tuning"
    }
    assert after["tuning"] == written.data and found().data.items() <= {**written.data, **found().data}.items()
    assert all(line in file.read_text() for line in profile.read_text().splitlines() if line.startswith("#"))
    once = file.read_text()
    write(file, Section())
    assert file.read_text() == once, "nothing to say changes nothing"


def test_sections_of_several_engines_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ntuning: {}   # nothing yet\n\n# of what\nprice: 3\n")
    write(file, found())
    other = Section()
    other.comments[()] = ["2026-11-27, NVIDIA H100: zoo tune qwen"]
    other.add(("skinny", "6144x4096.float8e4m3"), {"32": [32, 64, 128, 2, 4, 4]}, "again")
    other.add(("skinny", "512x512.bfloat16"), {"16": [16, 64, 64, 1, 4, 4]})
    write(file, other)
    data = yaml.safe_load(file.read_text())
    assert data["name"] == "mine" and data["price"] == 3
    assert data["tuning"]["skinny"]["6144x4096.float8e4m3"] == {"32": [32, 64, 128, 2, 4, 4]}, "the last word"
    assert data["tuning"]["attention"] == found().data["attention"] and "512x512.bfloat16" in data["tuning"]["skinny"]
    text = file.read_text()
    assert "zoo tune llama" in text and "zoo tune qwen" in text and "M=1 12.0 us" not in text and "# again" in text
    assert text.index("# of what") > text.index("tuning:")


def test_a_new_file_has_the_section_alone(tmp_path: Path) -> None:
    write(tmp_path / "new.yaml", found())
    assert yaml.safe_load((tmp_path / "new.yaml").read_text()) == {"tuning": found().data}
    assert read(tmp_path / "none.yaml")[1].data == {}


@pytest.mark.parametrize(
    "line",
    [
        "tuning: {skinny: {}}",
        "tuning:\n  skinny: {}",
        "tuning:\n  skinny:\n      deep: 1",
        'tuning:\n    "6144x4096": {}',
        "tuning:\n  rotary_elements: [1, 2",
        "tuning:\n  - a",
        'tuning:\n  skinny:\n    "a": {b: 1}',
    ],
)
def test_what_was_written_otherwise_is_not_touched(line: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\n{line}\nprice: 3\n")
    before = file.read_text()
    with pytest.raises(ConfigError, match=r"mine\.yaml: .* is not as `zoo tune` writes it; write to another file"):
        write(file, found())
    assert file.read_text() == before


def test_whether_an_engine_would_change() -> None:
    data = found().data
    assert differs(data, {}) and not differs({}, {}) and not differs(data, {**data, "row_warps": 8})


def test_a_hardware_spec_takes_it() -> None:
    spec = HardwareSpec("mine", "gpu", sm=90, memory=1, tuning=found().data)
    assert spec.build_fields()["tuning"] == found().data
