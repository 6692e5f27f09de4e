"""Encoders as a plain ONNX graph: whole texts at once, every token sees every other one, standard operators only.

The layers are those of ``zoo.graph_templates.decoder``, and so are the options: BERT (Devlin et al. 2018) is learned positions,
types, a norm behind the embedding, norms on the residual stream (``norm_place`` residual) and a plain MLP; RoBERTa (Liu et al.
2019) is the same with rows before position 0 (``position_offset``); ModernBERT (Warner et al. 2024) is rotary positions, of two
kinds, norms before the branches, a gated MLP, and a window on two layers of three, which reaches half of it to either side.

Inputs   token_ids, positions  [B, S] int64, and the weights
Output   hidden                [B, S, E] float32: what the last layer gives, behind the final norm if there is one

B batch, S sequence, E hidden. Rows of a batch are equally long: the graph masks no padding.
"""

from __future__ import annotations

from zoo.graph import ModelGraph
from zoo.graph_templates.builder import Builder
from zoo.graph_templates.decoder import embed, layers
from zoo.modelspec import ModelSpec


def encoder(model: ModelSpec, dtype: str, max_context: int = 0) -> ModelGraph:
    """The plain graph of one model; reads no checkpoint. See the module for inputs and output."""
    b = Builder(model, dtype, max_context)
    token_ids, positions = b.input("token_ids", "int64"), b.input("positions", "int64")
    hidden = layers(b, embed(b, token_ids, positions), token_ids, positions)
    b.output(b.cast("hidden", hidden, "float32"), "hidden")
    return b.out
