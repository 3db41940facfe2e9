"""`python -m bench.fp8_attention`: what rounding and summing cost FP8 attention, on a model of the kernel's loop.

A share is 2^(logit - level), before the division by the sum of all. e4m3 holds shares between 2^-9 and 448 = 2^8.8, and
FP8 products on sm_90 keep some 14 bits of their sum. So three choices are a matter of accuracy: LIFT, the logarithm of
the largest share where a row's level is set; ROOM, by how much more that may grow before the level follows; and how
many tiles of keys the tensor cores sum before float32 does. kernels/attention_gluon.py takes 8, 0 and 1.

The tables show the error of the output against the exact softmax of the same codes, and the share of tiles that settle:
that add the tensor cores' sum to the others, because it is full or one of 64 rows has a new level. Queries, keys and
values are those of the model `toon`, or random ones of the 14B model's size. docs/fp8.md draws the conclusions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from liverelay.engine.config import set_process_defaults

set_process_defaults()  # before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from liverelay.kernels import torch_ops  # noqa: E402
from liverelay.kernels.contract import FP8, Place  # noqa: E402

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
LOG2_E = 1.4426950408889634
ROWS, TILE, DEPTH, BITS = 64, 128, 32, 14  # DEPTH: what a wgmma sums at once
SPLITS = ((8, 0.0), (8, 0.8), (7, 1.8), (6, 2.8), (5, 3.8), (4, 4.8), (4, 4.0))  # LIFT and ROOM
PROMOTES = (1, 2, 4, 8, 1 << 20)


@dataclass(frozen=True)
class Operands:
    """Codes of queries [H, T, d], keys and values [H, N, d], as float32; scale turns q k^T into natural logits."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor  # [H, 1, 1]

    def exact(self) -> Tensor:
        """softmax(q k^T scale) v in float64."""
        q, k, v = (part.double() for part in (self.q, self.k, self.v))
        return (q @ k.mT * self.scale.double()).softmax(-1) @ v


def quantised(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """Of tensors [H, n, d]: one scale for each head, 16 times the deviation at the end of e4m3's range."""

    def codes(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = 16 * x.square().mean((1, 2), keepdim=True).sqrt() / 448
        return (x / scale).clamp(-448, 448).to(FP8).float(), scale

    (q, q_scale), (k, k_scale), (v, _) = codes(q), codes(k), codes(v)
    return Operands(q, k, v, q_scale * k_scale * q.shape[2] ** -0.5)


def summed(shares: Tensor, values: Tensor, total: Tensor, bits: int) -> Tensor:
    """total + shares @ values as the tensor cores add: DEPTH products and the sum so far are cut, one after the other,
    to `bits` bits below the largest of them. shares [H, T, n], values [H, n, d]; bits 0: exact."""
    if not bits:
        return total + shares @ values
    for first in range(0, shares.shape[2], DEPTH):
        part = slice(first, first + DEPTH)
        terms = shares[:, :, None, part] * values[:, part].mT[:, None]
        terms = torch.cat([terms, total.unsqueeze(3)], dim=3)
        quantum = torch.exp2(torch.frexp(terms.abs().amax(3, keepdim=True)).exponent.float() - bits)
        total = ((terms / quantum).trunc().sum(3, keepdim=True) * quantum).squeeze(3)
    return total


def attend(given: Operands, split: tuple[float, float], promote: int, bits: int = BITS) -> tuple[Tensor, float]:
    """The kernel's loop over tiles of keys, the last one first: the output, and the share of tiles that settle.

    split: LIFT and ROOM; without room the level follows the maximum. promote: tiles that the tensor cores sum at most.
    bits: of their sums, 0 for exact ones.
    """
    lift, room = split
    q, k, v = given.q, given.k, given.v
    scale, heads, settled = given.scale * LOG2_E, q.shape[0], 0
    tiles = list(range(0, k.shape[1], TILE))[::-1]
    level = torch.full((heads, q.shape[1], 1), -torch.inf)
    total = torch.zeros(heads, q.shape[1], 1)
    mixed = torch.zeros(heads, q.shape[1], v.shape[2])
    product = torch.zeros_like(mixed)
    for i, first in enumerate(tiles):
        part = slice(first, first + TILE)
        exponents = q @ k[:, part].mT * scale
        peak = exponents.amax(2, keepdim=True) - lift
        above = torch.where(peak > level + room, peak, level)
        shrink = torch.exp2(level - above)
        moved = (shrink < 1).any(1, keepdim=True)
        ends = moved if i % promote else torch.ones_like(moved)
        mixed = torch.where(ends, (mixed + product) * shrink, mixed)
        product = torch.where(ends, 0.0, product)
        shares = torch.exp2(exponents - above)
        total, level = total * shrink + shares.sum(2, keepdim=True), above
        product = summed(shares.to(FP8).float(), v[:, part], product, bits)
        settled += int(ends.sum()) if i else 0
    return (mixed + product) / total, settled / max(1, heads * (len(tiles) - 1))


# -- what is attended to ----------------------------------------------------------------------------------------------


def random_operands(deviation: float, seed: int, mean: float = 0.0) -> Operands:
    """Gaussian queries, keys and values; deviation: of natural logits; mean: of values, whose deviation is 1."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, 128, generator=rng) for n in (ROWS, 15312, 15312))
    return quantised(q * deviation, k, v + mean)


def one_peak(seed: int) -> Operands:
    """Every query finds one key that outweighs any other by some 8 nats; all the others together outweigh it again."""
    given = random_operands(1.0, seed, mean=1.0)
    at = torch.randperm(given.k.shape[1], generator=torch.Generator().manual_seed(seed))[: given.q.shape[1]]
    k = given.k.clone()
    k[:, at] = given.q / given.q.square().sum(2, keepdim=True) * 8 / given.scale
    return Operands(given.q, k.to(FP8).float(), given.v, given.scale)


def toon_operands(blocks: int) -> Operands:
    """Queries, keys and values of all layers and heads of the bundled model, of the last step of a block of speech."""
    from liverelay.engine import Engine

    engine, layers = Engine.load("toon", device="cpu"), list[list[Tensor]]()

    def keep(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place) -> Tensor:
        layers.append([part.transpose(0, 1).clone() for part in (q[-ROWS:], k[: place.valid], v[: place.valid])])
        return torch_ops.attention(q, k, v, out, place)

    engine.dit.attention = keep
    with engine.open(SAMPLES / "toon.png", "", audio=SAMPLES / "speech.wav") as session:
        for number, _ in enumerate(session.frames(), start=1):
            if number >= blocks:
                break
    last = layers[-engine.dit.config.num_layers :]
    engine.close()
    return quantised(*(torch.cat(part).float() for part in zip(*last, strict=True)))


SOURCES: dict[str, Callable[[], Operands]] = {
    "toon": lambda: toon_operands(8),
    "random, 1 nat": lambda: random_operands(1.0, 0),
    "random, 2 nats": lambda: random_operands(2.0, 1),
    "random, 4 nats": lambda: random_operands(4.0, 2),
    "2 nats, values with a mean": lambda: random_operands(2.0, 3, mean=1.0),
    "one peak": lambda: one_peak(4),
}


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    width = max(map(len, [title, *rows]))
    lines = [f"{title:{width}}" + "".join(f"{column:>12}" for column in columns)]
    return "\n".join(lines + [f"{name:{width}}" + "".join(f"{cell:>12}" for cell in row) for name, row in rows.items()])


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fp8_attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--promote", type=int, default=4, help="tiles of the first table's sums (4)")
    parser.add_argument("--lift", type=float, default=6.0, help="of the second table's sums of several tiles (6)")
    arguments = parser.parse_args()
    if arguments.promote < 1 or not 0 <= arguments.lift <= 8.8:
        parser.error("--promote takes 1 or more, --lift 0 to 8.8")
    shared = (arguments.lift, round(8.8 - arguments.lift, 1))
    results: dict[str, dict[str, list[float]]] = {"split": {}, "settled": {}, "promote": {}}
    for name, make in SOURCES.items():
        given = make()
        exact = given.exact()

        def error(out: Tensor, exact: Tensor = exact) -> float:
            return float((out.double() - exact).norm() / exact.norm())

        attended = [attend(given, split, arguments.promote) for split in SPLITS]
        results["split"][name] = [error(out) for out, _ in attended]
        results["settled"][name] = [settled for _, settled in attended]
        results["promote"][name] = [error(attend(given, shared if n > 1 else (8.0, 0.0), n)[0]) for n in PROMOTES]
        print(f"{name}: done", flush=True)
    splits, counts = [f"{lift} + {room}" for lift, room in SPLITS], ["1 (8 + 0)", *map(str, PROMOTES[1:-1]), "all"]
    for key, title, columns in (
        ("split", f"error, {arguments.promote} tiles a sum, by LIFT + ROOM", splits),
        ("settled", "tiles that settle, the same", splits),
        ("promote", f"error, LIFT + ROOM {shared[0]:g} + {shared[1]:g}, by tiles a sum", counts),
    ):  # fmt: skip
        rows = {name: [f"{value:.4f}" for value in row] for name, row in results[key].items()}
        print("\n" + table(title, columns, rows))
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
