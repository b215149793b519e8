"""The shape of a language model, read from its config.json. Standard library, Python 3.10."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunesmith.basemodel.architecture import is_tied, quantization
from tunesmith.core.documents import ModelConfig

# Names of one figure in config.json, by whose model it is: Llama's first, then GPT-2's, OPT's.
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Bytes of a number, by the word of config.json.
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Nobody has made these; a figure above them is a fault, and would make the sums absurd.
_MOST = 1 << 32


@dataclass(frozen=True)
class ModelShape:
    """What decides how much memory a model takes.

    `hidden`, `inner` and `head` are lengths of vectors: of a token, inside the MLP, of one head;
    `keys` are the heads of keys and values; `experts` the MLPs of a layer. `parameters` is all of
    them, head and embedding once where they are `tied`; `apart` are those of them that see or
    hear, which LLaMA-Factory leaves as they are.
    """

    hidden: int
    layers: int
    heads: int
    keys: int
    head: int
    inner: int
    vocabulary: int
    experts: int
    tied: bool
    parameters: int
    apart: int = 0

    @property
    def embedding(self) -> int:
        """Numbers of the embedding, and of the head, which is as large."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Numbers of one layer."""
        outside = self.embedding * (1 if self.tied else 2)
        return max(0, self.parameters - self.apart - outside) // self.layers

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """The matrices of a layer's attention as (in, out), by Llama's names."""
        query, pair = self.heads * self.head, self.keys * self.head
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, pair),
            "v_proj": (self.hidden, pair),
            "o_proj": (query, self.hidden),
        }

    @property
    def mlp(self) -> dict[str, tuple[int, int]]:
        """The matrices of one MLP as (in, out), by Llama's names."""
        return {
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def linear(self) -> int:
        """Numbers in the matrices of all layers: what quantisation makes smaller."""
        return min(self.layer, _numbers(self.attention) + self.experts * _numbers(self.mlp)) * (
            self.layers
        )


def shape_of(config: ModelConfig, weight_bytes: int | None = None) -> ModelShape | None:
    """Return the shape of a model; None where its config.json does not have the usual figures.

    `weight_bytes` is the size of its weights as they are stored. From it the numbers are counted,
    those of a vision part too; without it they are those of a Llama of this shape.
    """
    text = config.get("text_config")
    own = {**config, **text} if isinstance(text, dict) else dict(config)
    hidden, layers, heads = _first(own, _HIDDEN), _first(own, _LAYERS), _first(own, _HEADS)
    vocabulary = _first(own, ("vocab_size",))
    if not (hidden and layers and heads and vocabulary):
        return None
    experts = _first(own, _EXPERTS) or 1
    inner = _first(own, _INNER) or 4 * hidden
    if experts > 1:
        inner = _first(own, ("moe_intermediate_size",)) or inner
    keys = _first(own, ("num_key_value_heads",)) or heads
    head = _first(own, ("head_dim",)) or max(1, hidden // heads)
    bare = ModelShape(
        hidden, layers, heads, keys, head, inner, vocabulary, experts, is_tied(own), 0
    )
    each = _numbers(bare.attention) + experts * _numbers(bare.mlp) + 2 * hidden
    counted = bare.embedding * (1 if bare.tied else 2) + layers * each + hidden
    size = _BYTES.get(str(own.get("torch_dtype")))
    apart = 0
    if weight_bytes and size and quantization(config) is None:
        stored = weight_bytes // size
        apart = max(0, stored - counted) if "vision_config" in config else 0
        counted = stored
    return replace(bare, parameters=counted, apart=apart)


def _numbers(matrices: dict[str, tuple[int, int]]) -> int:
    return sum(inner * outer for inner, outer in matrices.values())


def _first(config: ModelConfig, names: tuple[str, ...]) -> int:
    """Return the first of the figures that is one, 0 where none is."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST:
            return value
    return 0
