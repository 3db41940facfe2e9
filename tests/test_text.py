"""Prompts: cleaning, tokens, the name map, padding that changes nothing, files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from liverelay.engine.errors import CheckpointError, InputError
from liverelay.engine.models.text import TextEncoder, clean_text, library_key, text_shapes
from tests.compare import relative

pytest.importorskip("transformers", reason="transformers is not installed")
F32 = torch.float32


def random_weights(rng: torch.Generator, vocab: int = 300) -> dict[str, Tensor]:
    shapes = text_shapes(vocab, 32, 48, 4, 32, 2)
    return {key: torch.randn(shape, generator=rng) * 0.3 + (len(shape) == 1) for key, shape in shapes.items()}


def test_prompts_are_cleaned_as_published(golden: Path) -> None:
    pytest.importorskip("ftfy")
    cases = json.loads((golden / "text_tiny" / "clean.json").read_text())
    assert cases
    for case in cases:
        assert clean_text(case["in"]) == case["out"], case


def test_full_size_keys_and_shapes_are_the_published_ones(golden: Path) -> None:
    published = json.loads((golden / "text_tiny" / "full_size_keys.json").read_text())["keys"]
    ours = text_shapes(256384, 4096, 10240, 64, 4096, 24)
    assert {key: list(shape) for key, shape in ours.items()} == published
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == 5_680_910_336
    assert len({library_key(key) for key in ours}) == len(ours) == 242


def test_position_buckets_are_the_published_ones(golden: Path) -> None:
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    table = json.loads((golden / "text_tiny" / "relpos_buckets.json").read_text())["bucket"]
    attention = UMT5Attention.__new__(UMT5Attention)
    torch.nn.Module.__init__(attention)
    attention.relative_attention_num_buckets, attention.relative_attention_max_distance = 32, 128
    attention.is_decoder = False
    distances = torch.tensor([int(key) for key in table])
    assert attention._relative_position_bucket(distances).tolist() == list(table.values())


def test_padding_changes_no_valid_row(rng: torch.Generator) -> None:
    encoder = TextEncoder.load(random_weights(rng), None, dtype=F32)
    ids = torch.randint(3, 300, (1, 23), generator=rng)
    padded = torch.nn.functional.pad(ids, (0, 41))
    alone = encoder.encode_ids(ids, torch.ones_like(ids))[0]
    with_padding = encoder.encode_ids(padded, (padded > 0).long())[0, :23]
    assert relative(with_padding, alone) <= 1e-6


def test_prompts_end_with_the_end_token_and_are_cut_at_the_limit(checkpoint: Path, rng: torch.Generator) -> None:
    tokenizer = checkpoint / "google" / "umt5-xxl"
    encoder = TextEncoder.load(random_weights(rng), tokenizer, dtype=F32, text_len=12)
    assert encoder.encode("").shape == (1, 32)
    assert encoder.encode("abc").shape == (4, 32)
    assert encoder.encode("  abc \n").equal(encoder.encode("abc"))
    assert not encoder.encode("Abc").equal(encoder.encode("abc"))
    assert encoder.encode("a long prompt, much longer than that").shape == (12, 32)
    assert encoder.encode("漢字 ü 🙂").isfinite().all()


def test_without_a_tokenizer_ids_only(rng: torch.Generator, tmp_path: Path) -> None:
    weights = random_weights(rng)
    with pytest.raises(InputError, match="without a tokenizer"):
        TextEncoder.load(weights, None, dtype=F32).encode("a")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        TextEncoder.load(weights, tmp_path, dtype=F32)


@pytest.mark.parametrize("fault", ["missing", "misshapen", "unknown", "empty"])
def test_a_key_that_does_not_fit_is_named(rng: torch.Generator, fault: str) -> None:
    weights, key = random_weights(rng), "blocks.1.ffn.fc2.weight"
    if fault == "missing":
        del weights[key]
    elif fault == "misshapen":
        weights[key] = weights[key][:-1]
    elif fault == "unknown":
        key = "blocks.1.attn.q.bias"
        weights[key] = torch.zeros(32)
    else:
        weights, key = {}, "token_embedding.weight"
    with pytest.raises(CheckpointError, match=key):
        TextEncoder.load(weights, None)


def test_the_golden_is_not_changed_by_batching(golden: Path) -> None:
    folder = golden / "text_tiny"
    encoder = TextEncoder.load(load_file(folder / "weights.safetensors"), None, dtype=F32)
    inputs = load_file(folder / "inputs.safetensors")
    together = encoder.encode_ids(inputs["ids"], inputs["mask"])
    for i, mask in enumerate(inputs["mask"]):
        length = int(mask.sum())
        alone = encoder.encode_ids(inputs["ids"][i : i + 1, :length], mask[None, :length])[0]
        assert relative(alone, together[i, :length]) <= 1e-5
