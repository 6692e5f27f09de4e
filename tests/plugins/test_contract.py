"""The contract of zoo ops: names, attributes, and what every plugin in the list promises."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
import pytest

from zoo.errors import GraphError
from zoo.plugins import PLUGINS
from zoo.plugins.paged_attention import PLUGIN

GIVEN = {"num_heads": 4, "kv_heads": 2, "head_dim": 8, "block_size": 16, "scale": 0.25}


def tensors(count: int) -> list[gs.Variable]:
    return [gs.Variable(f"t{number}") for number in range(count)]


def test_the_list_is_by_op_type() -> None:
    assert {op: plugin.op for op, plugin in PLUGINS.items()} == {op: op for op in PLUGINS}


@pytest.mark.parametrize("op", PLUGINS)
def test_bodies_are_valid_functions_of_standard_ops(op: str) -> None:
    body = PLUGINS[op].body
    onnx.checker.check_function(body)
    assert [entry.domain for entry in body.opset_import] == [""]
    declared = {attribute.name for attribute in PLUGINS[op].attributes} | {"plugin_namespace", "plugin_version"}
    assert set(body.attribute) == declared


@pytest.mark.parametrize("op", PLUGINS)
def test_an_output_that_shares_a_buffer_has_its_inputs_shape(op: str) -> None:
    inputs = {port.name: port for port in PLUGINS[op].inputs}
    for port in PLUGINS[op].outputs:
        if port.alias:
            assert (inputs[port.alias].shape, inputs[port.alias].dtype) == (port.shape, port.dtype)


def test_a_node_carries_every_attribute_and_the_plugins_name() -> None:
    node = PLUGIN.node("n", tensors(7), tensors(2), **GIVEN)
    assert node.attrs == {**GIVEN, "window": 0, "softcap": 0.0, "plugin_namespace": "zoo", "plugin_version": "1"}
    assert isinstance(node.attrs["softcap"], float) and isinstance(node.attrs["window"], int)
    assert (node.op, node.domain) == ("ZooPagedAttention", "zoo")


def test_wrong_nodes_are_refused() -> None:
    with pytest.raises(GraphError, match="n: ZooPagedAttention needs the attribute scale"):
        PLUGIN.node("n", tensors(7), tensors(2), **{key: value for key, value in GIVEN.items() if key != "scale"})
    with pytest.raises(GraphError, match="has no attribute sinks; it has num_heads"):
        PLUGIN.node("n", tensors(7), tensors(2), **GIVEN, sinks=1)
    with pytest.raises(GraphError, match="takes 7 inputs and gives 2, not 3 and 2"):
        PLUGIN.node("n", tensors(3), tensors(2), **GIVEN)
