"""Composition: overrides, sweeps, a user's own folder, and every bad input with the message that it deserves."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from zoo import config
from zoo.config import compose, compose_model, compose_sweep, conf_dir, families, list_models
from zoo.errors import ConfigError
from zoo.spec import digest_of, to_json


def refuse(overrides: list[str], *parts: str, conf: Path | None = None) -> str:
    """The message of the ConfigError that composing gives; one line, with all these parts in it."""
    with pytest.raises(ConfigError) as error:
        compose(overrides, conf)
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    for part in parts:
        assert part in text, text
    return text


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own conf folder with one good model, ``mine``."""
    folder = tmp_path / "conf"
    (folder / "models").mkdir(parents=True)
    monkeypatch.setenv("ZOO_CONF", str(folder))
    write(folder, "name: mine")
    return folder


def write(folder: Path, *lines: str, head: str = "# @package model", name: str = "mine") -> Path:
    path = folder / "models" / f"{name}.yaml"
    path.write_text("\n".join([head, "defaults:", "  - zoo-demo@_here_", "  - _self_", *lines]) + "\n")
    return path


def test_overrides_reach_the_spec() -> None:
    spec = compose(
        [
            "models=llama-3.2-1b",
            "quant=fp8",
            "hardware=l40s",
            "limits.max_tokens=256",
            "limits.max_context=4096",
            "quant.skip=[lm_head,o]",
            "model.rope.theta=1000",
            "model.window=128",
            "model.window_layers=[1,3]",
            "registry.path='/a folder/with, commas'",
            "model.checkpoint=/path/to/it",
            "hardware.flops.bfloat16=1e12",
            "++model.norm_eps=1e-4",
        ]
    )
    assert spec.limits.max_tokens == 256 and spec.limits.blocks_per_sequence == 256
    assert spec.quant.skip == ("lm_head", "o") and spec.model.rope.theta == 1000.0 and isinstance(spec.model.rope.theta, float)
    assert spec.model.window_layers == (1, 3) and spec.model.norm_eps == 1e-4
    assert spec.registry == "/a folder/with, commas" and spec.model.checkpoint == "/path/to/it"
    assert compose(["threads=2"]).threads == 2
    assert compose(["threads=2", "hardware=l40s"]).threads == 0, "a GPU engine does not depend on them"


def test_what_a_family_knows_of_config_json_is_no_part_of_the_spec() -> None:
    data = to_json(compose(["models=qwen3-8b"]).model)
    assert "config" not in data and "architectures" not in data


def test_composing_twice_gives_the_same() -> None:
    first, second = compose(["models=gpt2"]), compose(["models=gpt2"])
    assert first == second and digest_of(to_json(first)) == digest_of(to_json(second))


def test_hydra_of_the_caller_is_left_alone() -> None:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        compose([])
        assert GlobalHydra.instance().hydra is before
    compose([])
    assert not GlobalHydra.instance().is_initialized()


def test_composing_is_fast_and_hydra_is_imported_only_then() -> None:
    code = (
        "import sys, time, zoo.config\n"
        "assert 'hydra' not in sys.modules and 'omegaconf' not in sys.modules\n"
        "zoo.config.compose(['models=llama-3.1-70b'])\n"
        "start = time.process_time()\n"
        "zoo.config.compose(['models=llama-3.1-70b'])\n"
        "print(time.process_time() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert float(done.stdout) < 1.0  # about 0.1 s on a quiet machine
    start = time.process_time()
    assert len(list_models()) >= 8
    assert time.process_time() - start < 0.1


def test_paths_do_not_depend_on_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = compose([]).model.checkpoint
    monkeypatch.chdir(tmp_path)
    assert compose([]).model.checkpoint == demo and Path(demo).is_absolute()
    assert compose(["model.checkpoint=some/where"]).model.checkpoint == str(tmp_path / "some" / "where")
    assert compose(["model.checkpoint="]).model.checkpoint == ""
    assert compose(["model.checkpoint=''"]).model.checkpoint == ""


def test_an_installed_conf_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel holds conf inside the package."""
    package = tmp_path / "site-packages" / "zoo"
    shutil.copytree(conf_dir(), package / "_data" / "conf")
    monkeypatch.setattr(config.files, "PACKAGE", package)
    assert conf_dir() == package / "_data" / "conf"
    assert compose([]).model.checkpoint == str(package / "_data" / "checkpoints" / "zoo-demo")
    shutil.rmtree(package / "_data")
    with pytest.raises(ConfigError, match="no conf folder"):
        conf_dir()


# Sweeps


def test_sweeps() -> None:
    specs = compose_sweep(["models=gpt2,zoo-demo", "hardware=l40s,rtx-4090", "limits.max_tokens=range(128,385,128)"])
    assert [(spec.model.name, spec.hardware.name, spec.limits.max_tokens) for spec in specs] == [
        (model, hardware, tokens)
        for model in ("gpt2", "zoo-demo")
        for hardware in ("l40s", "rtx-4090")
        for tokens in (128, 256, 384)
    ]
    assert [spec.overrides for spec in compose_sweep(["quant=fp8"])] == [("quant=fp8",)]
    names = [spec.hardware.name for spec in compose_sweep(["hardware=glob(rtx-*)"])]
    assert names == ["rtx-4090", "rtx-5090"]
    lists = compose_sweep(["quant=fp8", "quant.skip=[lm_head],[o,down]"])
    assert [spec.quant.skip for spec in lists] == [("lm_head",), ("o", "down")]


def test_one_bad_value_of_a_sweep() -> None:
    with pytest.raises(ConfigError, match=r"'l40'.*did you mean"):
        compose_sweep(["hardware=cpu,l40"])
    with pytest.raises(ConfigError, match="nothing matches"):
        compose_sweep(["hardware=glob(z*)"])
    refuse(["hardware=cpu,l40s"], "hardware=cpu,l40s", "need -m")
    refuse(["limits.max_tokens=1,2"], "need -m")


# A user's own folder


def test_a_model_of_the_users_own(mine: Path) -> None:
    write(mine, "name: mine", "hidden_size: 128", "checkpoint: checkpoints/x", "license: ${model.name}-license")
    spec = compose(["models=mine"])
    assert spec.model.hidden_size == 128 and spec.model.num_layers == 8 and spec.model.license == "mine-license"
    assert spec.model.checkpoint == str(mine.parent / "checkpoints" / "x"), "relative to the folder that holds conf"
    assert compose([]).model.name == "zoo-demo"
    assert "mine" in list_models() and "zoo-demo" in list_models()


def test_the_users_folder_comes_first(mine: Path) -> None:
    write(mine, "name: gpt2", "hidden_size: 512", name="gpt2")
    assert compose(["models=gpt2"]).model.hidden_size == 512
    (mine / "hardware").mkdir()
    (mine / "hardware" / "my-gpu.yaml").write_text(
        "# @package hardware\nname: my-gpu\nkind: gpu\nsm: 86\nmemory: 99\ndtypes: [float16]\ncompilers: [tensorrt_rtx]\n"
    )
    assert compose(["hardware=my-gpu"]).profile == "none-my-gpu-tensorrt_rtx-tp1"


def test_a_users_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CONF", "/not/there")
    refuse([], "ZOO_CONF is '/not/there', which is not a folder")


def test_another_conf_folder(tmp_path: Path) -> None:
    shutil.copytree(conf_dir(), tmp_path / "conf")
    text = (tmp_path / "conf" / "config.yaml").read_text().replace("max_tokens: 512", "max_tokens: 99")
    (tmp_path / "conf" / "config.yaml").write_text(text)
    assert compose([], tmp_path / "conf").limits.max_tokens == 99
    refuse([], "no config.yaml here", conf=tmp_path)


def test_a_model_from_text() -> None:
    sizes = "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size max_positions"
    lines = ["# @package model", "defaults:", "  - families/gpt2@_here_", "  - _self_", "name: given"]
    text = "\n".join([*lines, *(f"{key}: 8" for key in sizes.split(" "))])
    spec = compose_model(text, ["quant=fp8", "model.num_layers=3"])
    assert (spec.model.name, spec.model.num_layers, spec.model.norm, spec.quant.name) == ("given", 3, "layer", "fp8")
    with pytest.raises(ConfigError, match="no usable name"):
        compose_model("# @package model\nname: ../x\n")
    with pytest.raises(ConfigError, match=r"unknown key 'model.hiden'; did you mean"):
        compose_model(text + "\nhiden: 8")


NUMBERS = ["1000", "1e5", "1.10", "null", "true", "0x10", "off"]


@pytest.mark.parametrize("name", NUMBERS)
def test_names_that_hydra_would_read_as_something_else(mine: Path, name: str) -> None:
    write(mine, f'name: "{name}"', name=name)
    assert compose([f"models={name}"]).model.name == compose([f"models='{name}'"]).model.name == name
    assert compose_model((mine / "models" / f"{name}.yaml").read_text()).model.name == name
    assert [spec.model.name for spec in compose_sweep([f"models=gpt2,{name}"])] == ["gpt2", name]


def test_a_missing_name_that_hydra_would_read_as_something_else() -> None:
    for name in NUMBERS:
        refuse([f"models={name}"], f"models {name!r} (conf/models): pick one of {', '.join(list_models())}")


# Bad input: keys


def test_unknown_overrides_are_answered_with_near_names() -> None:
    refuse(["modle.hiden_size=3"], "override 'modle.hiden_size=3'", "unknown key", "did you mean 'model.hidden_size'")
    refuse(["limits.max_token=3"], "did you mean 'limits.max_tokens'")
    refuse(["model=zoo-demo"], "choose with models=NAME")
    refuse(["modles=zoo-demo"], "unknown key 'modles'", "did you mean 'models'")
    refuse(["hardwear=cpu"], "did you mean 'hardware'")
    refuse(["model.rope.tetha=3"], "did you mean 'model.rope.theta'")
    refuse(["+extra=1"], "unknown key 'extra'")
    refuse(["model.hidden_size.x=1"], "unknown key")
    refuse(["limits=3"], "limits")


def test_unknown_options_are_answered_with_the_options() -> None:
    models = ", ".join(list_models())
    refuse(["models=zoo-deno"], f"models 'zoo-deno' (conf/models): pick one of {models}", "did you mean 'zoo-demo'")
    refuse(["quant=fp9"], "quant 'fp9' (conf/quant): pick one of fp8, fp8-kv, none")
    refuse(["hardware=[cpu]"], "pick one of a100-80g, cpu")
    refuse(["models=../hardware/cpu"], "pick one of")
    refuse(["models=null"], "pick one of")
    refuse(["compiler=gcc"], "compiler 'gcc': pick one of onnxruntime")
    refuse(["dtype=float8"], "dtype 'float8' (known are float32, float16, bfloat16)", "computes in float32")


@pytest.mark.parametrize(
    "override", ["models", "=x", "a=b=c=[", "~models", "~model.hidden_size", "models@x=gpt2", "", "limits.max_tokens=[1"]
)
def test_malformed_overrides(override: str) -> None:
    refuse([override], f"override {override!r}")


@pytest.mark.parametrize("value", ["~/zoo", "/a(b", "/a'b", "ü", 'a"b', "{", "['a", "!x", "[" * 3000 + "]" * 3000])
def test_values_that_the_grammar_has_no_reading_for(value: str) -> None:
    said = refuse([f"registry.path={value}"], "the value cannot be read", "is put into quotes", "\"registry.path='")
    assert "Lexer" not in said and "^" not in said and "hydra" not in said.lower() and len(said) < 1000


def test_what_is_advised_for_such_a_value_works() -> None:
    said = refuse(["registry.path=/a(~'b"], "the value cannot be read")
    assert compose([said.split(": ")[-1].strip('"')]).registry == "/a(~'b"


def test_overrides_that_are_no_text() -> None:
    for override in ("registry.path=x\udcff", "registry.path='x\udcff'", "registry.path='a\nb'"):
        refuse([override], "control characters or bytes outside UTF-8")
    refuse(["registry.path=" + "a" * 10_000], "10,014 characters; at most 8,192")
    refuse(["registry.path='~no-such-user/x'"], "there is no user of this name")
    refuse(["model.checkpoint='~no-such-user/x'"], "there is no user of this name")


def test_sweeps_of_too_many() -> None:
    for overrides in (["limits.max_tokens=range(1,1000000000)"], ["threads=range(1,200)", "limits.max_tokens=range(1,200)"]):
        with pytest.raises(ConfigError, match=r"more than 10,000 values|39,601 combinations"):
            compose_sweep(overrides)


def test_hydra_settings_are_refused() -> None:
    refuse(["hydra.run.dir=x"], "Hydra's own settings")
    refuse(["hydra.searchpath=[file:///x]"], "ZOO_CONF")
    refuse(["hydra/launcher=joblib"], "Hydra's own settings")


def test_unknown_keys_of_a_file_are_named_with_it(mine: Path) -> None:
    path = write(mine, "hiden_size: 3")
    refuse(["models=mine"], str(path), "unknown key 'model.hiden_size'; did you mean 'hidden_size'?")
    write(mine, "rope: {tetha: 3}")
    refuse(["models=mine"], str(path), "unknown key 'model.rope.tetha'; did you mean 'theta'?")
    write(mine, "zzz: 3")
    refuse(["models=mine"], "unknown key 'model.zzz'; allowed here: name, family, vocab_size")
    write(mine, "limits: {max_tokens: 1}")
    refuse(["models=mine"], "unknown key 'model.limits'")
    write(mine, "3: 3")
    refuse(["models=mine"], "key 3 of model must be a text")


# Bad input: values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hidden_size: abc", "model.hidden_size is 'abc' (a text); it must be a whole number"),
        ("hidden_size: '64'", "model.hidden_size is '64' (a text); it must be a whole number"),
        ("hidden_size: 64.0", "model.hidden_size is 64.0 (a number); it must be a whole number"),
        ("hidden_size: true", "model.hidden_size is True (true or false); it must be a whole number"),
        ("hidden_size: null", "model.hidden_size is empty; it must be a whole number"),
        ("hidden_size: [64]", "model.hidden_size is [64] (a list); it must be a whole number"),
        ("hidden_size: {a: 1}", "model.hidden_size is a mapping; it must be a whole number"),
        ("hidden_size: 1000000000000000000000", "it must be a whole number of at most"),
        ("norm_eps: .nan", "model.norm_eps is nan (a number); it must be a number of at most"),
        ("norm_eps: .inf", "model.norm_eps is inf (a number)"),
        ("norm_eps: small", "model.norm_eps is 'small' (a text); it must be a number"),
        ("qkv_bias: 1", "model.qkv_bias is 1 (a whole number); it must be true or false"),
        ("tie_embeddings: 'yes'", "model.tie_embeddings is 'yes' (a text); it must be true or false"),
        ("license: 3", "model.license is 3 (a whole number); it must be a text; put it into quotes"),
        ("rope: 3", "model.rope is 3 (a whole number); it must be a mapping of keys to values"),
        ("window_layers: 3", "model.window_layers is 3 (a whole number); it must be a list"),
        ("window_layers: [a]", "model.window_layers[0] is 'a' (a text); it must be a whole number"),
        ("tensors: {model: {embed: 3}}", "model.tensors.model.embed is 3"),
        ("activation: swiglu", "activation is 'swiglu'; pick one of silu, gelu"),
        ("num_heads: 3", "num_heads 3 is not divisible by num_kv_heads 2"),
        ("head_dim: 7", "rotary positions need an even head_dim"),
        ("num_layers: 0", "num_layers is 0; it must be at least 1"),
        ("norm_eps: 0", "norm_eps is 0.0; it must be more than 0"),
        ("rope: {theta: -1}", "model.rope needs theta > 0"),
        ("rope: {kind: llama3}", "needs original_max_positions"),
        ("rope: {kind: fast}", "rope.kind is 'fast'; pick one of default, linear, dynamic, yarn, llama3, longrope"),
        ("rope: {kind: yarn, factor: 4.0}", "model.rope of kind yarn needs original_max_positions, the context"),
        ("rope: {kind: yarn, factor: 0.5, original_max_positions: 64}", "kind yarn needs factor, how much longer"),
        ("rope: {kind: yarn, original_max_positions: 64, beta_slow: 40}", "needs theta over 1 and beta_fast over beta_slow"),
        ("rope: {kind: dynamic, factor: 4.0}", "model.rope of kind dynamic needs original_max_positions"),
        ("rope: {kind: dynamic, fraction: 0.03125, original_max_positions: 9}", "kind dynamic needs four rotated numbers"),
        ("rope: {kind: longrope, original_max_positions: 64}", "model.rope.short_factor has 0 numbers; kind longrope needs 32"),
        ("rope: {kind: longrope, short_factor: [a]}", "model.rope.short_factor[0] is 'a' (a text); it must be a number"),
        ("rope: {fraction: 1.5}", "0 < fraction <= 1"),
        ("window: 4\nlocal_rope: {theta: 9.0, kind: llama3}", "model.local_rope of kind llama3 needs original_max_positions"),
        ("window: 4\nlocal_rope: {theta: 9.0}\nrope: {kind: dynamic, original_max_positions: 9}", "does not go with local_rope"),
        ("rope_layers: [8]", "model.rope_layers has 8; layers are 0 to 7"),
        ("moe: {experts: 4, top_k: 2, dense_layers: [-1]}", "model.moe.dense_layers has -1; layers are 0 to 7"),
        ("window: -1", "model.window is -1; it must be at least 0"),
        ("window: 4\nwindow_layers: [99]", "model.window_layers has 99; layers are 0 to 7"),
        ("window_layers: [1]", "model.window is 0"),
        ("name: Mine Own", "model.name is 'Mine Own'; names are lower case"),
        ("num_layers: 1000000000", "num_layers is 1000000000; it must be at most 1024"),
        ("hidden_size: 1000000000", "hidden_size is 1000000000; it must be at most 1048576"),
        ("vocab_size: 1000000000", "vocab_size is 1000000000; it must be at most 16777216"),
        ("max_positions: 1000000000", "max_positions is 1000000000; it must be at most 134217728"),
        ("softcap: -1", "softcap is -1.0; it must be at least 0"),
        ("attention_scale: -0.5", "attention_scale is -0.5; it must be at least 0"),
        ("tensors: {ignored: [ok, '(']}", "model.tensors.ignored[1] is '(', which is no regular expression: missing )"),
        ("template: mixer", "template is 'mixer'"),
    ],
)  # fmt: skip
def test_wrong_values_of_a_file(mine: Path, line: str, message: str) -> None:
    write(mine, *([] if line.startswith("name") else ["name: mine"]), line)
    assert refuse(["models=mine"], message).startswith(f"{mine / 'models' / 'mine.yaml'}: "), "the file is named"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("limits.max_tokens=many", "limits.max_tokens is 'many' (a text); it must be a whole number"),
        ("limits.max_tokens='256'", "limits.max_tokens is '256' (a text); it must be a whole number"),
        ("limits.max_tokens=1.5", "it must be a whole number"),
        ("limits.max_tokens=null", "limits.max_tokens is empty"),
        ("limits.max_tokens=0", "max_tokens is 0; it must be at least 1"),
        ("limits.max_context=4096", "limits.max_context is 4096, but model 'zoo-demo' has positions for 2048"),
        ("limits.max_blocks=3", "raise max_blocks to 129"),
        ("threads=-1", "threads is -1; it must be at least 0"),
        ("threads=1025", "threads is 1025; it must be at least 0 (0: all) and at most 1024"),
        ("limits.max_context=1", "max_context is 1; it must be at least 2"),
        ("limits.max_blocks=100000000000", "max_blocks is 100000000000; it must be at most 2147483647"),
        ("limits.max_tokens=1000000000", "max_tokens is 1000000000; it must be at most 134217728"),
        ("quant.calibration_tokens=0", "calibration_tokens is 0; it must be at least 1"),
        ("quant.name=../x", "quant: name is '../x'; names are lower case letters"),
        ("hardware.name=A", "hardware: name is 'A'; names are lower case letters"),
        ("parallel.name=.x", "parallel: name is '.x'; names are lower case letters"),
        ("quant.name=", "quant: name is ''; names are lower case letters"),
        ("threads=two", "threads is 'two'"),
        ("model.num_kv_heads=3", "zoo-demo.yaml with model.num_kv_heads=3: model 'zoo-demo': num_heads 4 is not divisible"),
        ("quant.skip=[lm_heads]", "skip names 'lm_heads'; linear roles are q, k, v"),
        ("compiler=3", "compiler is 3"),
        ("model.tensors={a: 1}", "choose"),
    ],
)  # fmt: skip
def test_wrong_values_of_an_override(override: str, message: str) -> None:
    if override.startswith("model.tensors"):
        message = "unknown key 'model.tensors.a'"
    refuse([override], message)


# Bad input: combinations


def test_fused_roles_may_be_skipped_by_their_own_name() -> None:
    assert compose(["quant=fp8", "quant.skip=[qkv,gate_up]"]).quant.skip == ("qkv", "gate_up")


def test_combinations_that_cannot_be() -> None:
    refuse(["model.rope.fraction=0.02"], "rope.fraction (0.02) rotates an even number, at least 2 (here 1)")
    refuse(["models=qwen3-8b", "model.rope.fraction=0.005"], "at least 2 (here 0)")
    refuse(["models=llama-3.1-70b", "hardware=h100-sxm", "model.max_positions=1048576"], "lower limits.max_context")
    refuse(["quant=fp8", "hardware=a100-80g"], "quant 'fp8' cannot run on hardware 'a100-80g' (SM 8.0): it runs none",
           "choose quant=none, or hardware that runs fp8: cpu, h100-sxm, h200-sxm, l40s, rtx-4090, rtx-5090")  # fmt: skip
    refuse(["compiler=tensorrt_rtx"], "compiler 'tensorrt_rtx' for hardware 'cpu'", "pick one of onnxruntime")
    refuse(["compiler=cuda", "hardware=l40s"], "not among the compilers of this hardware; pick one of tensorrt_rtx, tensorrt")
    refuse(["quant=fp8-kv", "hardware=l40s"], "keeps keys and values as fp8, which compiler 'tensorrt_rtx' cannot", "cuda")
    refuse(["compiler=tensorrt_rtx", "hardware=h200-sxm"], "not among the compilers of this hardware")
    refuse(
        ["hardware=l40s", "hardware.compilers=[cuda]"],
        "none of its compilers can build for it: cuda: it builds for SM 9.0, not 8.9",
    )
    refuse(["hardware=h100-sxm", "hardware.compilers=[tensorrt_rtx]"], "it builds for SM 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not 9.0")
    refuse(["hardware=l40s", "hardware.compilers=[onnxruntime]"], "it builds for no GPU")
    refuse(["hardware=l40s", "dtype=float32"], "computes in bfloat16, float16")
    refuse(["parallel=tp2"], "parallel 'tp2'", "not built yet; use parallel=tp1")
    refuse(["parallel.pp=2"], "not built yet")


# Bad input: references and code


RESOLVERS = [
    "${oc.env:HOME}",
    "${oc.env:HOME,x}",
    "a-${oc.env:HOME}",
    "${oc.decode:x}",
    "${now:%Y}",
    "${hydra:job.name}",
    "${a.${oc.env:X}}",
    "${eval:1}",
    "${ oc.env:HOME }",
]


@pytest.mark.parametrize("text", RESOLVERS)
def test_resolvers_in_a_file_are_refused_before_they_run(mine: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "SECRET-VALUE")
    for key, line in (("model.license", f"license: '{text}'"), ("model.window_layers[0]", f"window_layers: ['{text}']"),
                      ("model.tensors.model.embed", f"tensors: {{model: {{embed: '{text}'}}}}")):  # fmt: skip
        path = write(mine, line)
        said = refuse(["models=mine"], str(path), key, "may refer to config keys only")
        assert "SECRET-VALUE" not in said
    path = mine / "models" / "mine.yaml"
    path.write_text(f"# @package model\ndefaults:\n  - '{text}@_here_'\n")
    assert "SECRET-VALUE" not in refuse(["models=mine"], str(path), "defaults")


@pytest.mark.parametrize("text", RESOLVERS)
def test_resolvers_in_an_override_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "SECRET-VALUE")
    for key in ("model.license", "models", "registry.path", "limits.max_tokens"):
        said = refuse([f"{key}={text}"], key, "may refer to config keys only")
        assert "SECRET-VALUE" not in said
        with pytest.raises(ConfigError, match="may refer to config keys only"):
            compose_sweep([f"{key}={text},x"])


def test_references_to_keys_are_resolved(mine: Path) -> None:
    write(mine, "name: mine", "intermediate_size: ${model.hidden_size}", "license: of-${.name}")
    model = compose(["models=mine", "model.base_model=${model.family}/x", "limits.max_rows=${limits.max_sequences}"]).model
    assert (model.intermediate_size, model.license, model.base_model) == (256, "of-mine", "llama/x")
    write(mine, "name: mine", "intermediate_size: ${model.name}")
    refuse(["models=mine"], "model.intermediate_size", "'mine'")
    write(mine, "name: mine", "intermediate_size: ${model.nothing}")
    refuse(["models=mine"], "model.nothing")
    write(mine, "name: mine", "license: ${model.license}")
    refuse(["models=mine"], "license")
    write(mine, "name: mine", "license: ${hydra.job.name}")
    refuse(["models=mine"], "hydra.job.name")


def test_references_that_multiply_are_refused_before_they_are_resolved() -> None:
    names = [f"model.tensors.model.a{number}" for number in range(40)]
    bomb = [f"+{names[0]}=x"] + [f"+{one}='${{{other}}}${{{other}}}'" for other, one in itertools.pairwise(names)]
    start = time.process_time()
    refuse(bomb, "78 references to other keys (${...}); at most 16 are resolved")
    assert time.process_time() - start < 5
    assert compose(bomb[:9]).model.tensors.model["a8"] == "x" * 256


def test_import_paths_are_refused(mine: Path) -> None:
    for line in ("_target_: os.system", "rope: {_target_: os.system}", "tensors: {model: {_target_: os.system}}",
                 "architectures: {X: {defaults: {_target_: os.system}}}"):  # fmt: skip
        path = write(mine, "name: mine", line)
        refuse(["models=mine"], str(path), "_target_ is not allowed; configs are data and name no Python")
    refuse(["+model._target_=os.system"], "_target_", "name no Python")
    refuse(["model.tensors.model._target_=os.system"], "name no Python")
    refuse(["model.tensors.model={_target_: os.system}"], "name no Python")


def test_python_tags_of_yaml_are_refused(mine: Path) -> None:
    path = write(mine, "license: !!python/object/apply:os.system ['true']")
    refuse(["models=mine"], str(path), "not readable YAML")


# Bad input: files


def test_broken_files_are_named(mine: Path) -> None:
    path = write(mine, "license: [")
    refuse(["models=mine"], str(path), "line 6", "not readable YAML")
    write(mine, "license: a", "license: b")
    refuse(["models=mine"], str(path), "not readable YAML", "license")
    path.write_text("# @package model\n- a\n")
    refuse(["models=mine"], str(path))
    path.write_text("# @package model\njust text\n")
    refuse(["models=mine"], str(path))
    path.write_bytes(b"# @package model\nlicense: \xff\xfe\n")
    refuse(["models=mine"], str(path))
    write(mine, "name: mine", head="# a comment")
    refuse(["models=mine"], str(path), "the first line must be '# @package model'")
    path.write_text("# @package model\ndefaults:\n  - families/lama@_here_\n  - _self_\nname: mine\n")
    refuse(
        ["models=mine"],
        "conf/models/mine.yaml: defaults: there is no models/families/lama; pick one of ",
        f"{', '.join(sorted(families()))}; did you mean 'llama'?",
    )
    path.write_text("# @package model\ndefaults:\n  - gtp2@_here_\n  - _self_\nname: mine\n")
    refuse(["models=mine"], "models/gtp2", f"pick one of {', '.join(list_models())}", "did you mean 'gpt2'?")
    path.write_text("# @package model\nname: mine\n")
    refuse(["models=mine"], str(path), "family is missing")


BOMB = ["a: &a [x, x, x, x, x, x, x, x, x]"] + [
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghij")
]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (BOMB, "line 6: the alias *a is not allowed; write ${key} to refer"),
        (["license: &l [*l]"], "the alias *l is not allowed"),
        (["license: " + "[" * 3000 + "]" * 3000], "nested more than 64 deep"),
        (["license: " + "{a: " * 70 + "}" * 70], "nested more than 64 deep"),
        (["license: [" + "a," * 20_001 + "]"], "more than 20,000 values"),
        (["license: " + "a" * (1 << 20)], "bytes; a config has at most 1,048,576"),
    ],
    ids=["bomb", "self", "lists", "mappings", "values", "bytes"],
)
def test_files_that_would_take_long(mine: Path, lines: list[str], message: str) -> None:
    path = write(mine, *lines)
    start = time.process_time()
    refuse(["models=mine"], str(path), message)
    path.rename(mine / "models" / "unused.yaml")
    (mine / "models" / "families").mkdir()
    (mine / "models" / "unused.yaml").rename(mine / "models" / "families" / "mine.yaml")
    with pytest.raises(ConfigError, match=message.split("; ")[0].split(": ")[-1].replace("*", r"\*")):
        families()
    assert time.process_time() - start < 5


def test_a_family_without_here_is_explained(mine: Path) -> None:
    path = mine / "models" / "mine.yaml"
    path.write_text("# @package model\ndefaults:\n  - families/llama\n  - _self_\nname: mine\n")
    refuse(["models=mine"], str(path), "families/llama@_here_")


def test_wrong_values_of_other_groups_are_named(mine: Path) -> None:
    (mine / "quant").mkdir()
    path = mine / "quant" / "mine.yaml"
    for text, message in (
        ("name: mine\nmethod: fp9\n", "method is 'fp9'; pick one of none, fp8"),
        ("name: mine\nmetod: fp8\n", "unknown key 'quant.metod'; did you mean 'method'"),
        ("name: mine\ncalibration_tokens: many\n", "quant.calibration_tokens is 'many' (a text); it must be a whole number"),
    ):
        path.write_text("# @package quant\n" + text)
        refuse(["quant=mine"], message)
