"""FP8 cache: the ops that write and read a layer's pool become those for float8 values, with a scale each for keys and values.

    qkv, ..., kv.{i}, token_slots ─ ZooRotaryCache ─▶     becomes   the same, kv_scale.{i} ─ ZooRotaryCacheFp8 ─▶
    q, kv_out.{i}, ... ─ ZooCachedAttention ─▶            becomes   the same, kv_scale.{i} ─ ZooCachedAttentionFp8 ─▶

Scales are weights, so recalibrating changes no node. In the graph the pool keeps the compute type, so that any ONNX runtime can
run it: a compiler gives the pool its own type (``BuildSpec.cache_dtype``).
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zoo.errors import PassError
from zoo.graph import Miss, ModelGraph, PassReport
from zoo.passes.frame import Pass, PassContext
from zoo.plugins import cached_attention, rotary_cache
from zoo.plugins.contract import Plugin
from zoo.plugins.paged_attention.body import VARIANTS
from zoo.spec import BuildSpec
from zoo.targets import Target
from zoo.weights.recipe import Recipe, Weight, concat, scale

FP8 = rotary_cache.FP8
PLUGINS: dict[str, Plugin] = rotary_cache.PLUGINS | cached_attention.PLUGINS
# op type -> the op for a float8 pool
TWINS: dict[str, str] = {
    **{name: name + FP8 for name in rotary_cache.PLUGINS if not name.endswith(FP8)},
    **{
        cached_attention.op_name(False, out8, variant): cached_attention.op_name(True, out8, variant)
        for variant in VARIANTS
        for out8 in (False, True)
    },
}


class QuantizeCache(Pass):
    """Keep keys and values as float8e4m3. Count: ``layers``."""

    name = "quantize_cache"
    phase = "lowering"

    def wanted(self, build: BuildSpec, target: Target) -> bool:
        return build.quant.kv_cache == "fp8"

    def demanded(self, build: BuildSpec, target: Target) -> bool:
        return True

    def apply(self, graph: ModelGraph, ctx: PassContext) -> PassReport:
        return quantize_cache(graph)

    def ensures(self, graph: ModelGraph, ctx: PassContext) -> None:
        if left := [node.name for node in graph.graph.nodes if node.op in TWINS]:
            raise PassError(f"these nodes still have a pool of the compute type: {', '.join(left[:5])}")


def quantize_cache(graph: ModelGraph) -> PassReport:
    """The pass itself; it asks nothing of the build."""
    report = PassReport(QuantizeCache.name)
    scales: dict[str, gs.Variable] = {}
    for place, node in enumerate(graph.graph.nodes):
        if node.op not in TWINS:
            continue
        plugin, twin = PLUGINS[node.op], PLUGINS[TWINS[node.op]]
        given = {port.name: tensor for port, tensor in zip(plugin.inputs, node.inputs, strict=True)}
        layer = _layer(given["kv"].name)
        if not layer:
            report.misses.append(Miss(node.name, f"its pool is {given['kv'].name}, which is no layer's"))
            continue
        if layer not in scales:
            recipe = cache_scale(layer)
            scales[layer] = graph.add_weight(Weight(f"kv_scale.{layer}", "float32", recipe))
            report.counts["layers"] = report.counts.get("layers", 0) + 1
        given["kv_scale"] = scales[layer]
        outputs = list(node.outputs)
        node.inputs.clear()
        node.outputs.clear()
        attrs = {name: value for name, value in node.attrs.items() if not name.startswith("plugin_")}
        graph.graph.nodes[place] = twin.node(node.name, [given[port.name] for port in twin.inputs], outputs, **attrs)
        graph.functions[twin.op] = twin.body
    return report


def cache_scale(layer: str) -> Recipe:
    """[2]: the calibrated scales of a layer's keys and values."""
    parts = [Recipe("reshape", (1,), (scale(f"layer.{layer}.{role}_cache"),)) for role in ("k", "v")]
    return concat(parts, 0)


def _layer(pool: str) -> str:
    head, _, layer = pool.partition(".")
    return layer if head in ("kv", "kv_out") and layer.isdigit() else ""
