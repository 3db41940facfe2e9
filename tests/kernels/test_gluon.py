"""The specialised attention: sizes that its loops are about, and a proof that faults of its protocol would be seen.

Without a GPU it runs in the machine of kernels/gluon_interpreter.py, in several orders; with an sm_90 the same
sizes run on it. The second half breaks the source in one place each time: the machine must object.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
attention_gluon = pytest.importorskip("liverelay.kernels.attention_gluon", exc_type=ImportError)
from liverelay.kernels import torch_ops  # noqa: E402
from liverelay.kernels.attention import (  # noqa: E402
    attention_descriptor,
    attention_pointer,
    make_fp8,
    make_inputs,
    reference_attention,
)
from liverelay.kernels.attention_backends import Attention  # noqa: E402
from liverelay.kernels.contract import FP8, Scales  # noqa: E402
from liverelay.kernels.launch import INTERPRETED  # noqa: E402
from liverelay.kernels.spec import Case  # noqa: E402

if INTERPRETED:
    from liverelay.kernels import gluon_interpreter as gi
    from liverelay.kernels import gluon_machine as gm

interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU a fault would hang or pass unseen")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not (INTERPRETED or HOPPER), reason="the kernel is for sm_90")
SIZES = {
    "one-key": (200, 1, 64, 9, 1),
    "one-key-before-a-tile": (128, 2, 128, 300, 127),
    "one-key-after-a-tile": (128, 2, 128, 300, 129),
    "whole": (130, 2, 64, 256, 256),
    "stages-wrap-around": (300, 5, 128, 1290, 1285),
    "full-arena": (260, 4, 32, 1280, 1280),
    "one-query": (1, 7, 64, 513, 512),
}


Size = tuple[int, int, int, int, int]
ALLOWED = {torch.bfloat16: 4e-3, FP8: 0.03}  # e4m3 rounds every weight by up to 1 / 16
BOTH = pytest.mark.parametrize("dtype", ALLOWED, ids=["bf16", "fp8"])


def case_of(size: Size, dtype: torch.dtype, seed: int, device: torch.device) -> Case:
    dims = dict(zip(("tokens", "heads", "head_dim", "rows", "valid"), size, strict=True)) | {"placed": 1}
    rng = torch.Generator().manual_seed(seed)
    return make_fp8(dims, torch.bfloat16, rng, device) if dtype == FP8 else make_inputs(dims, dtype, rng, device)


def error_of(case: Case) -> float:
    """Relative error of what the case's output holds; NaN where it holds one."""
    exact = reference_attention(*case.args)["out"]
    return float((case.outputs["out"].double() - exact).norm() / exact.norm())


def in_order(seed: int) -> object:
    return gi.order(seed) if INTERPRETED else nullcontext()


@BOTH
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sizes_of_the_loops(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    case = case_of(size, dtype, seed, device)
    with in_order(seed):
        attention_gluon.attention_specialised(*case.args)
    assert error_of(case) < ALLOWED[dtype]


def test_half_precision(device: torch.device, seed: int) -> None:
    case = case_of((140, 3, 64, 200, 190), torch.float16, seed, device)
    attention_gluon.attention_specialised(*case.args)
    assert error_of(case) < 5e-4


@BOTH
def test_large_logits(dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Weights far below and above those of the first tile; their exponentials would overflow without the maximum."""
    case = case_of((140, 2, 64, 700, 690), dtype, seed, device)
    q, k = case.args[:2]
    growing = torch.linspace(0.1, 10, len(k), device=device)[:, None, None]
    if dtype == FP8:
        case.args[5].q.fill_(30)
        case.args[5].k.fill_(1)
        k.copy_(k.float() * growing)
    else:
        q.mul_(30)
        k.mul_(growing.to(dtype))
    attention_gluon.attention_specialised(*case.args)
    assert error_of(case) < 1.5 * ALLOWED[dtype]


def test_sums_of_fp8_products_do_not_fade(device: torch.device, seed: int) -> None:
    """Tensor cores cut what they sum to some 14 bits: values of one sign lose the more, the more tiles a sum has."""
    case = case_of((64, 1, 64, 4000, 4000), FP8, seed, device)
    for codes, scale in zip(case.args[:2], (case.args[5].q, case.args[5].k), strict=True):
        codes.copy_(codes.float() / 4)
        scale.fill_(1.0)
    case.args[2].copy_(case.args[2].float() + 20)
    attention_gluon.attention_specialised(*case.args)
    assert error_of(case) < 1.8e-3


@pytest.mark.parametrize(
    "attend", [torch_ops.attention, attention_pointer, attention_descriptor, attention_gluon.attention_specialised]
)
def test_many_small_fp8_shares_are_not_lost_beside_one_large(
    attend: Attention, device: torch.device, seed: int
) -> None:
    """e4m3 ends at 2^-9: where a row's largest share were 1, the others here would all be rounded to 0 or to 2^-9."""
    q, k, v, out, _, scales = case_of((64, 1, 32, 700, 700), FP8, seed, device).args
    for part, scale in ((q, scales.q), (k, scales.k)):
        part.zero_()
        scale.fill_(1)
    scales.q.fill_(32**0.5)
    q[:, :, 0], k[3, :, 0] = 1, 7  # in nats, above the others' 0
    v.copy_(v.float() + 4)
    attend(q, k, v, out, None, scales)
    exact = reference_attention(q, k, v, out, None, scales)["out"]
    assert (out.double() - exact).norm() < 0.01 * exact.norm()


def test_a_factor_of_every_query(device: torch.device, seed: int) -> None:
    q, k, v, out, _ = case_of((140, 3, 64, 200, 200), torch.bfloat16, seed, device).args
    factors = torch.rand(140, generator=torch.Generator().manual_seed(seed)).to(device) + 0.1
    attention_gluon.attention_specialised(q, k, v, out, q_factor=factors)
    exact = reference_attention(q, k, v, out, q_factor=factors)["out"]
    assert (out.double() - exact).norm() < ALLOWED[torch.bfloat16] * exact.norm()
    with pytest.raises(ValueError, match="specialised attention: q_factor has shape"):
        attention_gluon.attention_specialised(q, k, v, out, q_factor=factors[1:])


@BOTH
def test_without_valid_rows_it_ends(dtype: torch.dtype, device: torch.device, seed: int) -> None:
    case = case_of((140, 2, 64, 300, 200), dtype, seed, device)
    case.args[4].fill(0, 0, False)
    attention_gluon.attention_specialised(*case.args)
    assert case.outputs["out"].isnan().all()


def test_refusals(device: torch.device, seed: int) -> None:
    case = case_of((4, 2, 64, 8, 8), torch.bfloat16, seed, device)
    q, k, v, out, place = case.args
    attention = attention_gluon.attention_specialised
    across = k.transpose(0, 1).contiguous().transpose(0, 1)
    for wrong in ([part.float() for part in (q, k, v, out)], [part[..., :48].contiguous() for part in (q, k, v, out)],
                  [q, across, v, out]):  # fmt: skip
        with pytest.raises(ValueError, match="specialised attention: needs contiguous"):
            attention(*wrong, place)
    with pytest.raises(ValueError, match="specialised attention: head size 64, 8 rows, dtypes"):
        attention(q, k, v.half(), out, place)
    with pytest.raises(ValueError, match="specialised attention: v has shape"):
        attention(q, k, v[:4], out, place)


def test_refusals_in_fp8(device: torch.device, seed: int) -> None:
    case = case_of((4, 2, 64, 8, 8), FP8, seed, device)
    q, k, v, out, place, scales = case.args
    attention = attention_gluon.attention_specialised
    with pytest.raises(ValueError, match="specialised attention: v has shape"):
        attention(q, k, v.contiguous(), out, place, scales)
    with pytest.raises(ValueError, match="specialised attention: needs contiguous"):
        attention(q, k, v, out.float(), place, scales)
    with pytest.raises(ValueError, match="specialised attention: TMA cannot take v: it starts 1 bytes"):
        attention(q, k[1:], v[1:], out, place, scales)
    with pytest.raises(ValueError, match="specialised attention: the scale of k has shape"):
        attention(q, k, v, out, place, Scales(scales.q, scales.k[:1], 1.0))
    with pytest.raises(ValueError, match="specialised attention: queries in FP8 have one scale for each head"):
        attention(q, k, v, out, place, scales, torch.ones(len(q), device=device))


# -- the machine ------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (128, FP8)])
def test_many_orders_give_the_same_bits(head_dim: int, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    results = []
    for number in range(8):
        case = case_of((300, 4, head_dim, 700, 650), dtype, seed, device)
        with gi.order(seed + number):
            attention_gluon.attention_specialised(*case.args)
        results.append(case.outputs["out"])
    assert error_of(case) < ALLOWED[dtype]
    assert all(torch.equal(result, results[0]) for result in results)


def mutant(path: Path, *changes: tuple[str, str]) -> ModuleType:
    """The kernel's module with parts of its source replaced; each must stand there exactly once."""
    source = Path(inspect.getfile(attention_gluon)).read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTANT_SIZES: dict[torch.dtype, list[Size]] = {  # two stages and four
    torch.bfloat16: [(300, 4, 128, 700, 650), (300, 4, 64, 1100, 1090)], FP8: [(300, 4, 64, 1100, 1090)],
}  # fmt: skip


def objections(module: ModuleType, dtypes: Iterable[torch.dtype], seed: int) -> Iterator[str]:
    """What the machine says, or the wrong result, in some orders."""
    for number, dtype in itertools.product(range(2), dtypes):
        for size in MUTANT_SIZES[dtype]:
            case = case_of(size, dtype, seed, torch.device("cpu"))
            try:
                with gi.order(seed + number):
                    module.attention_specialised(*case.args)
            except gm.Fault as fault:
                yield str(fault)
            else:
                yield "" if error_of(case) < ALLOWED[dtype] else "wrong result"


def line(depth: int, text: str) -> str:
    """A whole line of the source, with the end of the one before it."""
    return f"\n{' ' * depth}{text}\n"


WAIT_Q = line(8, "mbarrier.wait(q_full.index(WHICH), turn)")
WAIT_K = line(8, "mbarrier.wait(k_full.index(stage), phase)")
WAIT_NEXT = "mbarrier.wait(k_full.index(following), phase_following, pred=back + 1 < last)"
WAIT_V = line(12, "mbarrier.wait(v_full.index(stage), phase)")
WAIT_LAST_V = line(8, "mbarrier.wait(v_full.index(stage), phase)")
WAIT_EMPTY = line(4, "mbarrier.wait(empty.index(stage), phase ^ 1)")
WAIT_RAW = line(4, "mbarrier.wait(raw, turn)")
LOGITS = line(12, "logits = warpgroup_mma_wait(1, deps=(asked,))")
PRODUCT = line(12, "product = warpgroup_mma_wait(0, deps=(mixing,))")
FREE_Q = line(8, "mbarrier.arrive(q_empty.index(WHICH), count=1)")
FREE_K = line(12, "mbarrier.arrive(k_empty.index(after), count=1)")
FREE_V = line(12, "mbarrier.arrive(v_empty.index(stage), count=1)")
FREE_LAST_V = line(8, "mbarrier.arrive(v_empty.index(stage), count=1)")
STORED = line(8, "tma.store_wait(0)")
LAST_STORED = line(4, "tma.store_wait(0)")
VALUES = "values = (v_s, barriers(STAGES, 1), barriers(STAGES, 2))"
INIT_FENCE = f"    {VALUES}\n    fence_async_shared()\n"
OUT_FENCE = "(result.to(out_s.dtype))\n        fence_async_shared()\n"
SETTLED = line(12, "mixed, product = settled(mixed, product, fade, shrink, FP8)  # in FP8 the product runs meanwhile")
FULL_BYTES = "mbarrier.expect(full.index(stage), descriptor.block_type.nbytes)"
SHARES = "            shares = gl.exp2(logits * scale[:, None] - above[:, None])\n"
ZEROS = "(place < left)[:, None]"
ZERO_WORDS = "kept = left - 4 *"
ANY = ""  # which fault it is depends on the order
Change = tuple[str, str]


def drop(text: str) -> Change:
    return text, "\n"


def swap(first: str, second: str) -> Change:
    """Two lines that follow each other, in the other order."""
    return first + second[1:], second + first[1:]


MUTATIONS: dict[str, tuple[str, Change]] = {
    "queries read before they are there": (ANY, drop(WAIT_Q)),
    "keys read before they are there": (ANY, drop(WAIT_K)),
    "next keys read before they are there": ("race", (WAIT_NEXT, "pass")),
    "values read before they are there": ("race", drop(WAIT_V)),
    "the tile's last values read before they are there": (ANY, drop(WAIT_LAST_V)),
    "queries waited for in the wrong phase": (ANY, (WAIT_Q, WAIT_Q.replace("turn", "turn ^ 1"))),
    "queries waited for in the first phase": (ANY, (WAIT_Q, WAIT_Q.replace("turn", "0"))),
    "keys waited for in the wrong phase": (ANY, (WAIT_K, WAIT_K.replace("phase", "phase ^ 1"))),
    "values waited for in the wrong phase": (ANY, (WAIT_V, WAIT_V.replace("phase", "phase ^ 1"))),
    "stages filled before they are empty": ("race", drop(WAIT_EMPTY)),
    "empty stages waited for in the wrong phase": ("deadlock", (WAIT_EMPTY, WAIT_EMPTY.replace(" ^ 1", ""))),
    "queries loaded over those that are read": (
        "race", drop(line(12, "mbarrier.wait(q_empty.index(which), turn ^ 1)"))),
    "queries given back before the product": (ANY, (WAIT_K, WAIT_K + FREE_Q[1:])),
    "queries never given back": ("deadlock", drop(FREE_Q)),
    "keys given back before the product has ended": ("race", (
        LOGITS + FREE_K[1:], FREE_K + LOGITS[1:])),
    "values given back before the product has ended": ("race", swap(PRODUCT, FREE_V)),
    "keys never given back": ("deadlock", drop(FREE_K)),
    "values never given back": ("deadlock", drop(FREE_LAST_V)),
    "values given back twice": (ANY, (FREE_V, FREE_V + FREE_V[1:])),
    "one of two readers is enough": (
        ANY, (VALUES, VALUES.replace("2", "1"))),
    "logits taken while both products run": ("does not give", (LOGITS, LOGITS.replace("(1,", "(2,"))),
    "a product's result used without its wait": ("before its wait", (PRODUCT, line(12, "product = mixing"))),
    "softmax with the old logits": ("wrong result", (SHARES, SHARES.replace("logits", "gl.zeros_like(logits)"))),
    "sums that are not scaled": ("wrong result", drop(
        line(12, "total *= gl.convert_layout(shrink[:, None], total.type.layout, assert_trivial=True)"))),
    "a product that is not settled": ("wrong result", drop(SETTLED)),
    "output overwritten while it is stored": ("race", drop(STORED)),
    "the program ends while it stores": ("ends with a TMA store", drop(LAST_STORED)),
    "no fence between output and store": ("no fence", (OUT_FENCE, OUT_FENCE.splitlines()[0] + "\n")),
    "no fence between zeros and product": (
        "no fence", ("    fence_async_shared()  # before the tensor cores' own reads\n", "")),
    "no fence after the barriers' init": ("init it cannot see", (INIT_FENCE, INIT_FENCE.splitlines()[0] + "\n")),
    "old values not replaced by zeros": ("wrong result", ("(back == 0) & (left < TILE_N)", "back < 0")),
    "zeros before the copy has arrived": ("race", drop(WAIT_RAW)),
    "zeros after the wrong phase": (ANY, (WAIT_RAW, WAIT_RAW.replace("turn", "0"))),
    "a key past the last one counts": ("wrong result", ("layout=COLUMN) < left", "layout=COLUMN) <= left")),
    "fewer bytes expected": (ANY, (FULL_BYTES, FULL_BYTES.replace("nbytes", "nbytes // 2"))),
    "more bytes expected": ("deadlock", (FULL_BYTES, FULL_BYTES.replace("nbytes", "nbytes * 2"))),
    "the producer counts a step too many": (ANY, ("        turn ^= 1\n\n", "        turn ^= 1\n        step += 1\n\n")),
    "a copy that nobody waits for": ("nobody", (
        "        turn ^= 1\n\n", "        turn ^= 1\n    load_tile(v, 0, 0, values, step, STAGES, FP8)\n\n")),
}  # fmt: skip
MUTATIONS_16_BITS: dict[str, tuple[str, Change]] = {
    "one row of zeros too few": ("wrong result", (ZEROS, ZEROS.replace("<", "<="))),
    "one row of zeros too many": ("wrong result", (ZEROS, ZEROS.replace("left", "left - 1"))),
}
MUTATIONS_FP8: dict[str, tuple[str, Change]] = {
    "one column of zeros too few": ("wrong result", (ZERO_WORDS, ZERO_WORDS.replace("left", "left + 1"))),
    "columns of zeros too many": ("wrong result", (ZERO_WORDS, ZERO_WORDS.replace("left", "left - 60"))),
    "weights in the order of shuffled keys": ("wrong result", (".permute([0, 1, 3, 2, 4])", "")),
    "the last tile shuffled": ("wrong result", ("FP8 and not LAST", "FP8")),
    "sums that do not fade": ("wrong result", ("mixed * fade[:, None] + product", "mixed + product")),
    "sums that fade a tile too early": ("wrong result", drop(line(12, "fade = shrink"))),
    "the first head's scale of queries": ("wrong result", ("q_scales + head", "q_scales")),
    "the first head's scale of keys": ("wrong result", ("k_scales + head", "k_scales")),
}  # fmt: skip
BROKEN = [
    pytest.param(text, change, dtypes, id=name)
    for mutations, dtypes in ((MUTATIONS, list(ALLOWED)), (MUTATIONS_16_BITS, [torch.bfloat16]), (MUTATIONS_FP8, [FP8]))
    for name, (text, change) in mutations.items()
]


@interpreted
@pytest.mark.parametrize(("text", "change", "dtypes"), BROKEN)
def test_a_broken_protocol_is_seen(
    text: str, change: Change, dtypes: list[torch.dtype], tmp_path: Path, seed: int
) -> None:
    """Whatever the order: every run must be objected to."""
    said = list(objections(mutant(tmp_path / "mutant.py", change), dtypes, seed))
    print(*said, sep="\n")
    assert all(said) and any(text in objection for objection in said)


@interpreted
def test_the_unbroken_one_passes_the_same(tmp_path: Path, seed: int) -> None:
    assert not any(objections(mutant(tmp_path / "same.py"), ALLOWED, seed))
