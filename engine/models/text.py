"""Prompt -> umT5 encoder states (spec vae_audio_text.md section 5), through transformers."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liverelay.engine.errors import CheckpointError, InputError, MissingExtraError
from liverelay.engine.models.weights import check_shapes

TEXT_LEN = 512
Shapes = dict[str, tuple[int, ...]]
_LEAVES = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


def clean_text(text: str) -> str:
    """ftfy, HTML-unescape twice, strip, every run of Unicode white space to one space (spec 5.1). Case is kept."""
    try:
        import ftfy
        import regex
    except ImportError as error:
        raise MissingExtraError(error.name or "ftfy", "to clean prompts", "text") from None
    fixed = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return str(regex.sub(r"\s+", " ", fixed)).strip()


def text_shapes(vocab: int, dim: int, dim_ffn: int, heads: int, dim_attn: int, layers: int) -> Shapes:
    """Every key of the published encoder with its shape (spec 5.3)."""
    per_layer: Shapes = {
        "norm1.weight": (dim,),
        **{f"attn.{part}.weight": (dim_attn, dim) for part in "qkv"},
        "attn.o.weight": (dim, dim_attn),
        "pos_embedding.embedding.weight": (32, heads),
        "norm2.weight": (dim,),
        "ffn.gate.0.weight": (dim_ffn, dim),
        "ffn.fc1.weight": (dim_ffn, dim),
        "ffn.fc2.weight": (dim, dim_ffn),
    }
    shapes: Shapes = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.{leaf}": shape for leaf, shape in per_layer.items()}
    return shapes


def text_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The arguments of `text_shapes` that give these shapes; CheckpointError names a key that does not fit."""
    needed = [f"blocks.0.{leaf}" for leaf in ("attn.q.weight", "pos_embedding.embedding.weight", "ffn.fc1.weight")]
    for key in ("token_embedding.weight", *needed):
        if len(shapes.get(key, ())) != 2:
            raise CheckpointError(f"the text encoder's weights lack '{key}'")
    (vocab, dim), (dim_attn, _) = shapes["token_embedding.weight"], shapes[needed[0]]
    heads, dim_ffn = shapes[needed[1]][1], shapes[needed[2]][0]
    layers = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    sizes = dict(vocab=vocab, dim=dim, dim_ffn=dim_ffn, heads=heads, dim_attn=dim_attn, layers=layers)
    check_shapes(shapes, text_shapes(**sizes), "the text encoder's file")
    return sizes


def library_key(key: str) -> str:
    """The name that transformers' UMT5EncoderModel gives to a published key."""
    if key.startswith("blocks."):
        _, index, leaf = key.split(".", 2)
        return f"encoder.block.{index}.{_LEAVES[leaf]}"
    return {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}[key]


class TextEncoder:
    """umT5 encoder with its tokenizer.

    weights: the model's parameters, which stay where they are: on `home`, or for None in their file. They are copied
    to the device for each call where that is somewhere else.
    """

    def __init__(
        self, model: Any, tokenizer: Any, weights: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype,
        text_len: int, home: torch.device | None,
    ) -> None:
        self._model, self._tokenizer, self._weights, self._text_len = model, tokenizer, weights, text_len
        self._device, self._dtype, self.home = device, dtype, home

    @classmethod
    def load(
        cls,
        weights: Mapping[str, Tensor],
        tokenizer: Path | None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        text_len: int = TEXT_LEN,
        home: torch.device | None = None,
    ) -> TextEncoder:
        """Build from published tensors and a tokenizer folder (None: only `encode_ids` can be used).

        home: where the weights stay between calls; None: only where `weights` are. Sizes come from the tensors'
        shapes. CheckpointError names a key or shape that does not fit.
        """
        model = _build(**text_sizes({key: tuple(tensor.shape) for key, tensor in weights.items()}))
        state = {library_key(key): tensor for key, tensor in weights.items()}
        if home is not None:  # a copy, because a mapped file may go, or be read from the disk again
            state = {key: tensor.to(home, dtype, copy=True) for key, tensor in state.items()}
        return cls(
            model.eval(), _tokenizer(tokenizer), state, device=torch.device(device), dtype=dtype, text_len=text_len,
            home=home,
        )  # fmt: skip

    def encode(self, prompt: str) -> Tensor:
        """States of a prompt [n, dim], n <= text_len with the end token; no padding (it changes no valid row)."""
        if self._tokenizer is None:
            raise InputError("this text encoder was loaded without a tokenizer")
        ids = self._tokenizer(clean_text(prompt), truncation=True, max_length=self._text_len)["input_ids"]
        tokens = torch.tensor([ids])
        return self.encode_ids(tokens, torch.ones_like(tokens))[0]

    @torch.inference_mode()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [N, n] int64 -> states after the final norm [N, n, dim]; rows where mask is 0 mean nothing."""
        if ids.shape != mask.shape or ids.dim() != 2:
            raise InputError(f"ids of shape {list(ids.shape)} and mask of shape {list(mask.shape)} do not fit")
        with self._weights_on_device():
            out = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device))
        states: Tensor = out.last_hidden_state
        return states

    @contextlib.contextmanager
    def _weights_on_device(self) -> Iterator[None]:
        """The model with its weights; copies of weights that live elsewhere are gone afterwards."""
        state = {key: tensor.to(self._device, self._dtype) for key, tensor in self._weights.items()}
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
        self._model.load_state_dict(state, assign=True)
        del state
        try:
            yield
        finally:
            self._model.to("meta")


def _build(*, vocab: int, dim: int, dim_ffn: int, heads: int, dim_attn: int, layers: int) -> Any:
    """The model on the meta device: no memory until its tensors are assigned."""
    try:
        from transformers import UMT5Config, UMT5EncoderModel
    except ImportError:
        raise MissingExtraError("transformers", "to encode prompts", "text") from None
    config = UMT5Config(
        vocab_size=vocab, d_model=dim, d_kv=dim_attn // heads, d_ff=dim_ffn, num_layers=layers, num_heads=heads,
        relative_attention_num_buckets=32, relative_attention_max_distance=128, feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6, dropout_rate=0.0,
    )
    with torch.device("meta"):
        # Eager attention is bit-equal to the published encoder in bfloat16 (spec section 11).
        return UMT5EncoderModel._from_config(config, attn_implementation="eager")


def _tokenizer(folder: Path | None) -> Any:
    if folder is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"{folder} is not a readable tokenizer folder: {line}") from None
