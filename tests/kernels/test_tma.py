"""TMA's rules: each is refused before a launch and seen in the interpreters, and all sizes of stages keep them.

A GPU ends the process's context where a rule is broken, so what is broken here only ever runs without one.
"""

from __future__ import annotations

import importlib.util
import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")
attention_gluon = pytest.importorskip("liverelay.kernels.attention_gluon", exc_type=ImportError)
from liverelay.engine.cache import Arena  # noqa: E402
from liverelay.engine.config import DiTConfig  # noqa: E402
from liverelay.engine.models.geometry import Geometry  # noqa: E402
from liverelay.kernels import attention, tma  # noqa: E402
from liverelay.kernels.attention import make_fp8, reference_attention  # noqa: E402
from liverelay.kernels.contract import FP8, Place, Scales  # noqa: E402
from liverelay.kernels.launch import INTERPRETED  # noqa: E402
from liverelay.kernels.spec import Case  # noqa: E402
from liverelay.kernels.tma import View  # noqa: E402

if INTERPRETED:
    from liverelay.kernels import gluon_machine as gm

interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU a fault would end the process's context")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not (INTERPRETED or HOPPER), reason="the kernel is for sm_90")
Size = tuple[int, int, int, int, int]  # tokens, heads, head size, rows, valid
ODD_ROWS: list[Size] = [(3, 2, 64, 9, 1), (1, 7, 64, 513, 512), (300, 5, 128, 1290, 1285)]
EVEN_ROWS: list[Size] = [(3, 2, 64, 12, 1), (1, 7, 64, 516, 512), (300, 5, 128, 1296, 1285)]


def case_of(size: Size, seed: int, device: torch.device) -> Case:
    dims = dict(zip(("tokens", "heads", "head_dim", "rows", "valid"), size, strict=True)) | {"placed": 1}
    return make_fp8(dims, torch.bfloat16, torch.Generator().manual_seed(seed), device)


def right(case: Case) -> bool:
    exact = reference_attention(*case.args)["out"]
    return float((case.outputs["out"].double() - exact).norm() / exact.norm()) < 0.03


# -- the rules --------------------------------------------------------------------------------------------------------

GOOD = View(1 << 20, 2, (300, 256), (256, 1), (64, 128), 128)
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no dimension": (dict(shape=(), strides=(), block=()), "0 dimensions"),
    "six dimensions": (dict(shape=(8,) * 6, strides=(8,) * 5 + (1,), block=(8,) * 6), "6 dimensions"),
    "a stride too few": (dict(strides=(1,)), "1 strides"),
    "address": (dict(address=(1 << 20) + 8), "8 bytes past a multiple of 16"),
    "innermost": (dict(strides=(256, 2)), "not contiguous"),
    "stride": (dict(strides=(260, 1)), "stride of 520 bytes"),
    "long stride": (dict(strides=(1 << 39, 1)), "stride of 1099511627776 bytes"),
    "backwards": (dict(strides=(-256, 1)), "stride of -512 bytes"),
    "empty": (dict(shape=(0, 256)), "shape [0, 256]"),
    "long": (dict(shape=(1 << 31, 256)), "shape [2147483648, 256]"),
    "empty box": (dict(block=(0, 128)), "box [0, 128]"),
    "large box": (dict(block=(257, 128)), "box [257, 128]"),
    "thin box": (dict(block=(64, 4), swizzle=0), "box of 8 bytes"),
    "box less than the swizzle": (dict(block=(64, 32)), "swizzle of 128"),
    "box of one swizzle and a half": (dict(block=(64, 96)), "swizzle of 128"),
    "swizzle": (dict(swizzle=16), "swizzle of 16"),
}


@pytest.mark.parametrize(("changes", "text"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_of_a_map_is_named(changes: dict[str, Any], text: str) -> None:
    found = list(View(**(vars(GOOD) | changes)).faults())
    assert len(found) == 1 and text in found[0] and "\n" not in found[0]


def test_a_map_that_keeps_the_rules_passes() -> None:
    five = View(16, 1, (1, 2, 4, 2, 96), (1536, 192, 384, 96, 1), (8, 2, 4, 2, 32), 32)
    for view in (GOOD, five, View(32, 4, (7,), (1,), (128,))):
        assert not list(view.faults())


def test_starts_and_ends_of_copies() -> None:
    flat = View(0, 4, (1026,), (1,), (128,))
    assert [start for start in range(-8, 9) if not flat.start_fault(start)] == [-8, -4, 0, 4, 8]
    assert flat.store_fault() and not GOOD.store_fault()
    assert [offset for offset in range(0, 2049, 64) if not GOOD.memory_fault(offset)] == [0, 1024, 2048]
    assert not flat.memory_fault(128) and flat.memory_fault(64)


def test_descriptors_are_made_in_one_place() -> None:
    """So that none is made without the rules."""
    folder = Path(inspect.getfile(tma)).parent
    makers = ("import_module(\"triton.tools", "TensorDescriptor(", "from_tensor(", "make_tensor_descriptor(")
    found = {path.name for path in folder.glob("*.py") if any(text in path.read_text() for text in makers)}
    assert found == {"tma.py"}


def test_the_gate_sees_what_the_compiler_made_of_a_descriptor() -> None:
    given = tma.descriptor("a kernel", "x", torch.zeros(64, 128, dtype=torch.bfloat16), [64, 128])
    good = {"elem_size": 2, "block_size": [64, 64], "swizzle": 3}
    assert not list(tma.compiled_faults([1, given, "x"], [good])) and not list(tma.compiled_faults([given], []))
    for change in ({"block_size": [512, 64]}, {"swizzle": 3, "block_size": [64, 32]}):
        (fault,) = tma.compiled_faults([given], [good | change])
        assert fault.startswith("TMA cannot take descriptor 0: a box")
    given.strides = [132, 1]
    (fault,) = tma.compiled_faults([given], [good])
    assert "a stride of 264 bytes" in fault
    assert "2 tensor descriptors, the compiled kernel has 1" in next(tma.compiled_faults([given, given], [good]))


# -- launchers --------------------------------------------------------------------------------------------------------


@hopper
@pytest.mark.parametrize("size", ODD_ROWS + EVEN_ROWS)
def test_any_number_of_rows_is_right(size: Size, device: torch.device, seed: int) -> None:
    case = case_of(size, seed, device)
    attention_gluon.attention_specialised(*case.args)
    assert right(case)


def test_the_other_kernel_refuses_in_one_line_too(device: torch.device, seed: int) -> None:
    if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no descriptors here")
    q, k, v, out, place, scales = case_of((4, 2, 64, 32, 8), seed, device).args
    room = torch.zeros(4 * 2 * 64 + 1, dtype=FP8, device=device)
    attend, start = attention.attention_descriptor, "attention through descriptors: "
    with pytest.raises(ValueError, match=f"{start}TMA cannot take q: it starts 1 bytes past"):
        attend(room[1:].view(q.shape), k, v, out, place, scales)
    with pytest.raises(ValueError, match=f"{start}TMA cannot take v: it starts 1 bytes past"):
        attend(q, k[1:], v[1:], out, place, scales)
    apart = torch.zeros(2, 65, 32, dtype=FP8, device=device)[:, :64].movedim(-1, 0)
    with pytest.raises(ValueError, match=f"{start}the channels of v do not follow each other"):
        attend(q, k, apart, out, place, scales)
    short = torch.zeros(2, 64, 36, dtype=FP8, device=device)[..., :32].movedim(-1, 0)
    with pytest.raises(ValueError, match=f"{start}TMA cannot take v: a stride of 36 bytes"):
        attend(q, k, short, out, place, scales)


# -- every size of a stage --------------------------------------------------------------------------------------------

MODELS = {
    "published": DiTConfig(5120, 13824, 40, 3, ()), "tiny": DiTConfig(128, 256, 4, 3, ()),
    "odd": DiTConfig(96, 96, 3, 3, ()),
}  # fmt: skip


def rows_of(frame_tokens: int) -> Any:
    """As Geometry, with any number of tokens in a frame."""
    sink = frame_tokens * 5 // 2
    return SimpleNamespace(frame_tokens=frame_tokens, sink_tokens=sink, arena_tokens=sink + 12 * frame_tokens)


def frame_sizes(seed: int) -> Iterator[int]:
    """Tokens of a frame: all small numbers; all of pictures up to 1280x720 pixels; some up to the largest there is."""
    yield from range(1, 130)
    yield from (16 * count for count in range(9, 226))  # sides are multiples of 64 pixels, a token has 16 x 16
    rng = random.Random(seed)
    yield from (16 * rng.randint(1, 128) * rng.randint(1, 128) for _ in range(20))
    yield 16 * 128 * 128


@interpreted
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_tma_takes_the_arenas_of_every_size(
    config: DiTConfig, fp8: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers up to the launch, on tensors without memory, whose addresses count from 0: all layers of all arenas."""
    launched = []
    for module in (attention, attention_gluon):
        monkeypatch.setattr(module, "run", lambda *args, **meta: launched.append(args))
    dtype, place = FP8 if fp8 else torch.bfloat16, Place.make("cpu")
    factors = torch.empty(config.num_heads, device="meta")
    scales = Scales(factors, factors, 1.0) if fp8 else None
    for frame_tokens in frame_sizes(seed):
        geometry, heads = rows_of(frame_tokens), (config.num_heads, config.head_dim)
        for sink_only in (False, True):
            arena = Arena(config, geometry, "meta", torch.bfloat16, fp8=fp8, sink_only=sink_only)
            tokens = geometry.sink_tokens if sink_only else 3 * frame_tokens
            q = torch.empty(3 * frame_tokens, *heads, dtype=dtype, device="meta")[:tokens]
            out = torch.empty_like(q, dtype=torch.bfloat16)
            for i in range(config.num_layers):
                for attend in (attention.attention_descriptor, attention_gluon.attention_specialised):
                    attend(q, arena.k[i], arena.v[i], out, place, scales)
    assert len(launched) > 4000


def test_geometries_have_the_rows_that_are_checked() -> None:
    for latent in ((8, 8), (24, 40), (88, 48)):
        geometry = Geometry(*latent, head_dim=128)
        other = rows_of(geometry.frame_tokens)
        assert (other.sink_tokens, other.arena_tokens) == (geometry.sink_tokens, geometry.arena_tokens)


@hopper
@pytest.mark.parametrize("frame_tokens", [1, 3, 9, 19])
def test_frames_of_an_odd_size(frame_tokens: int, device: torch.device, seed: int) -> None:
    """Every fill level of the ring, in the last layer, whose memory starts wherever the others end."""
    geometry, config = rows_of(frame_tokens), DiTConfig(96, 96, 3, 3, ())
    arena = Arena(config, geometry, device, torch.bfloat16, fp8=True)
    for valid in range(geometry.sink_tokens + 3 * frame_tokens, geometry.arena_tokens + 1, 3 * frame_tokens):
        case = case_of((3 * frame_tokens, 3, 32, geometry.arena_tokens, valid), seed + valid, device)
        q, k, v, out, place, scales = case.args
        for target, source in ((arena.k, k), (arena.v, v)):
            target[-1].copy_(source)
        case = Case((q, arena.k[-1], arena.v[-1], out, place, scales), {}, case.outputs)
        attention_gluon.attention_specialised(*case.args)
        assert right(case)


@pytest.mark.parametrize("rows", [*range(1, 40), *range(120, 150), *range(250, 264), 513, 1290])
def test_shuffled_keys_hold_every_tile_but_the_last(rows: int) -> None:
    """Groups of 16 rows leave up to 15 out; none may be of a tile that is copied shuffled, however many rows count."""
    for valid in range(1, rows + 1):
        last = (valid - 1) // 128
        assert last * 128 <= rows // 16 * 16


# -- interpreters -----------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("old", "new", "text"), [
    ("(head * descriptor.block_type.shape[0], row) if", "(0, row + 8) if", "8 bytes past"),
    ("(row, head * descriptor.block_type.shape[1])", "(row, head * 32 + 4)", "4 bytes past"),
    ("0, 0, 0, head * k.block_type.shape[1]", "0, 0, 0, 17", "1 bytes past"),
    ("copy_out(out, [row, head * HEAD_DIM]", "copy_out(out, [row, 3]", "6 bytes past"),
])  # fmt: skip
def test_the_machine_sees_every_copy_and_store(
    old: str, new: str, text: str, tmp_path: Path, device: torch.device, seed: int
) -> None:
    source = Path(inspect.getfile(attention_gluon)).read_text()
    assert source.count(old) == 1
    (tmp_path / "mutant.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", tmp_path / "mutant.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = case_of((70, 2, 64, 300, 290), seed, device)
    with pytest.raises(gm.Fault, match=text):
        module.attention_specialised(*case.args)


@interpreted
def test_the_machine_sees_maps_and_places_in_shared_memory() -> None:
    x = torch.zeros(64, 128, dtype=torch.bfloat16)
    gl = attention_gluon.gl
    layout = gl.NVMMASharedLayout.get_default_for([16, 64], gl.bfloat16)
    given = tma.descriptor("a kernel", "x", x, [16, 64], layout)
    box = gm.Descriptor(given)
    buffers = gm.Memory.make(torch.bfloat16, [2, 20, 64], "buffers")
    assert box.box([0, 8], buffers.index(0).slice(0, 16))[1] == (slice(0, 16), slice(0, 64))
    box.box([-8, -8], buffers.index(0).slice(0, 16))  # before the tensor's start is allowed
    with pytest.raises(gm.Fault, match="a box lies 2560 bytes into shared memory, no multiple of 1024"):
        box.box([0, 8], buffers.index(1).slice(0, 16))
    with pytest.raises(gm.Fault, match=r"a box \[16, 64\] .* and buffers: \[20, 64\]"):
        box.box([0, 8], buffers.index(0))
    for name, value, text in (("strides", [132, 1], "stride of 264"), ("block_shape", [16, 32], "swizzle of 128"),
                              ("base", x.view(-1)[4:], "8 bytes past"), ("shape", [64, 0], "shape")):  # fmt: skip
        kept = getattr(given, name)
        setattr(given, name, value)
        with pytest.raises(gm.Fault, match=text):
            gm.Descriptor(given)
        setattr(given, name, kept)
    narrow = gm.Descriptor(tma.descriptor("a kernel", "x", x[:, :100], [16, 64], layout))
    with pytest.raises(gm.Fault, match="a store goes past the innermost 200 bytes"):
        narrow.box([0, 64], buffers.index(0).slice(0, 16), stored=True)


@triton.jit
def shift_kernel(source, target, load_at, store_at):
    target.store([0, store_at], source.load([0, load_at]))


def shifted(source: Tensor, load_at: int, store_at: int, width: int = 64) -> Tensor:
    target = torch.zeros(8, 64, dtype=torch.bfloat16)
    made = [tma.descriptor("shift", "x", part, [8, 16]) for part in (source, target[:, :width])]
    shift_kernel[(1,)](*made, load_at, store_at)
    return target


@interpreted
def test_tritons_interpreter_sees_starts_and_ends(rng: torch.Generator) -> None:
    source = torch.randn(8, 64, generator=rng).bfloat16()
    assert torch.equal(shifted(source, 8, 16)[:, 16:32], source[:, 8:24])
    for starts in ((4, 16), (8, 4)):
        with pytest.raises(Exception, match="a copy starts at element 4, 8 bytes past a multiple of 16"):
            shifted(source, *starts)
    with pytest.raises(Exception, match="a store goes past the innermost 120 bytes"):
        shifted(source, 8, 16, width=60)
