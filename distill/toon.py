"""The sizes of the small model, and the files of its checkpoint that are not trained: prompts and sound."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from distill.identity import COLOURS
from liverelay.engine.config import DiTConfig
from liverelay.engine.models.text import TextEncoder, text_shapes
from liverelay.engine.models.vae_config import VAEConfig
from liverelay.engine.models.weights import save_tensors

SIZE = 128  # pixels, both ways
BANDS = 40
DIT = DiTConfig(
    dim=128, ffn_dim=512, num_heads=2, num_layers=6, audio_inject_layers=(0, 2, 4), text_dim=32, text_len=16,
    audio_dim=BANDS, audio_states=1,
)  # fmt: skip
VAE = VAEConfig(base_dim=8, num_res_blocks=1)
SPECIAL = ("<pad>", "</s>", "<unk>")


def write_tokenizer(folder: Path, words: list[str]) -> None:
    """One token a word, in lower case, of a closed vocabulary; </s> ends a prompt as in umT5.

    Other words are left out, and a prompt that names no colour is an empty one: no word was learned without a colour.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " "),
        normalizers.Replace(Regex(r"\bgray\b"), "grey"),
        normalizers.Replace(Regex(rf"\b(?!({'|'.join(words)})\b)\w+"), " "),
        normalizers.Replace(Regex(rf"(?m)\A(?!.*\b({'|'.join(COLOURS)})\b).*\z"), ""),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=DIT.text_len,
    )
    fast.save_pretrained(str(folder))


def text_weights(count: int, seed: int = 0) -> dict[str, Tensor]:
    """A frozen text encoder of umT5's form: random vectors for words, little mixed with their neighbours.

    The transformer learns what they mean; of a word it only needs to know which one it is.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in text_shapes(count, DIT.text_dim, 2 * DIT.text_dim, 2, DIT.text_dim, 1).items():
        scale = 1.0 if key.startswith("token") else 0.3 * shape[-1] ** -0.5
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * scale
        weights[key] = value.bfloat16()
    return weights


def write_front_ends(text: Path, tokenizer: Path, audio: Path, words: list[str]) -> None:
    """The text encoder's file, and the folders of the tokenizer and the audio front end."""
    write_tokenizer(tokenizer, words)
    save_tensors(text, text_weights(len(SPECIAL) + len(words)))
    audio.mkdir(parents=True, exist_ok=True)
    (audio / "config.json").write_text(json.dumps({"model_type": "log_mel", "bands": BANDS}) + "\n")


def text_encoder(words: list[str], folder: Path) -> TextEncoder:
    """The engine's encoder of these prompts; the tokenizer's files are written to `folder`."""
    write_tokenizer(folder, words)
    return TextEncoder.load(text_weights(len(SPECIAL) + len(words)), folder, text_len=DIT.text_len, dtype=torch.float32)
