"""Templates: ``ModelSpec`` -> plain ONNX graph without weights. Reads no file, takes a fraction of a second at any size."""

from __future__ import annotations

from collections.abc import Callable

from zoo.errors import GraphError
from zoo.graph import ModelGraph
from zoo.graph_templates.decoder import decoder
from zoo.graph_templates.encoder import encoder
from zoo.spec import DTYPES, ModelSpec

TEMPLATES: dict[str, Callable[[ModelSpec, str, int], ModelGraph]] = {
    "decoder": decoder,
    "encoder": encoder,
}


def expand(model: ModelSpec, dtype: str, max_context: int = 0) -> ModelGraph:
    """Expand a model into its plain graph: token_ids, positions [B, S] int64 -> logits [B, S, V] float32,
    or of an encoder hidden [B, S, E] float32.

    dtype        compute type of weights and activations
    max_context  rows of the position tables; 0: the model's own limit

    Raises GraphError for an unknown template or dtype, or a context that the model has no positions for.
    """
    if model.template not in TEMPLATES:
        raise GraphError(f"model {model.name!r}: no template {model.template!r}; pick one of {', '.join(TEMPLATES)}")
    if dtype not in DTYPES:
        raise GraphError(f"model {model.name!r}: cannot expand in {dtype!r}; pick one of {', '.join(DTYPES)}")
    if not 0 <= max_context <= model.max_positions:
        raise GraphError(f"model {model.name!r}: max_context is {max_context}; it has positions for 1 to {model.max_positions}")
    return TEMPLATES[model.template](model, dtype, max_context)
