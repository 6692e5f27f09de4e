"""The contract of a zoo op: its inputs, outputs and attributes, its reference body, and its lowerings.

A zoo op has a unique ``Zoo``-prefixed op type in the domain ``zoo``. TensorRT looks at the op type and at two attributes,
``plugin_namespace`` and ``plugin_version``; every node carries both. The reference body is an ONNX function in standard
ops: it says what the op means, and any ONNX runtime can run it. A lowering is another function with the same meaning,
made for one kind of target; it may read index inputs, which a session derives from the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from zoo.errors import GraphError
from zoo.graph import IndexInput

DOMAIN = "zoo"
NAMESPACE = "zoo"


@dataclass(frozen=True)
class Port:
    """One input or output. ``dtype`` is a dtype name, or "T" for the model's compute type. Sizes are numbers or names.

    ``alias`` names the input whose buffer an output shares: the op updates it in place where the target can.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    alias: str = ""


@dataclass(frozen=True)
class Attribute:
    """One attribute. ``default`` None means that a node must give it."""

    name: str
    type: type  # int or float
    default: int | float | None = None


@dataclass(frozen=True)
class Lowering:
    """Other functions for the same op, made for one kind of target.

    inputs        in order, the plugin inputs and index inputs that the lowered node reads
    function      attributes of a node -> the function for it, whose name is the lowered node's op type
    index_inputs  become inputs of the graph; ``zoo.runtime.indices`` derives them from the batch
    domains       operator domains besides ONNX's own that the functions use
    """

    name: str
    inputs: tuple[str, ...]
    function: Callable[[Mapping[str, Any]], onnx.FunctionProto]
    index_inputs: tuple[IndexInput, ...] = ()
    domains: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plugin:
    """A zoo op. ``body`` is its reference function; its inputs, outputs and attributes are those of the contract."""

    op: str
    version: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    body: onnx.FunctionProto
    lowerings: Mapping[str, Lowering] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.op.startswith("Zoo") and self.body.name == self.op and self.body.domain == DOMAIN
        assert list(self.body.input) == [port.name for port in self.inputs], f"{self.op}: body and contract disagree on inputs"
        assert list(self.body.output) == [port.name for port in self.outputs], f"{self.op}: body and contract disagree on outputs"

    def node(self, name: str, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor], **attributes: Any) -> gs.Node:
        """A node of this op with every attribute written out. Raises GraphError for a wrong attribute or count."""
        if len(inputs) != len(self.inputs) or len(outputs) != len(self.outputs):
            raise GraphError(
                f"{name}: {self.op} takes {len(self.inputs)} inputs and gives {len(self.outputs)}, "
                f"not {len(inputs)} and {len(outputs)}"
            )
        return gs.Node(
            op=self.op, name=name, attrs=self.attrs(name, attributes), inputs=list(inputs), outputs=list(outputs), domain=DOMAIN
        )

    def attrs(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """All attributes of a node, defaults filled in, in the contract's order, with the plugin's namespace and version."""
        known = {attribute.name: attribute for attribute in self.attributes}
        if unknown := sorted(set(given) - set(known)):
            raise GraphError(f"{name}: {self.op} has no attribute {', '.join(unknown)}; it has {', '.join(known)}")
        attrs: dict[str, Any] = {}
        for key, attribute in known.items():
            value = given.get(key, attribute.default)
            if value is None:
                raise GraphError(f"{name}: {self.op} needs the attribute {key}")
            attrs[key] = attribute.type(value)
        return attrs | {"plugin_namespace": NAMESPACE, "plugin_version": self.version}


def function_attributes(attributes: Sequence[Attribute]) -> list[str]:
    """The attribute names that a function of a zoo op declares: its own and the two that TensorRT reads."""
    return [attribute.name for attribute in attributes] + ["plugin_namespace", "plugin_version"]
