"""What the compiler makes of the specialised attention; its results and its protocol: tests/kernels/test_gluon.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import subprocess, tempfile, torch, triton
from bench.fake_gpu import activate
activate(90)
from liverelay.kernels.attention_gluon import attention_specialised
from liverelay.kernels.contract import Scales, transposed
from liverelay.kernels.launch import compile_only
dtype = torch.{dtype}
q, k = (torch.empty(rows, 2, {head_dim}, dtype=dtype) for rows in (256, 1024))
with compile_only(90) as collected:
    if dtype.itemsize == 1:
        scales = Scales(torch.ones(2), torch.ones(2), 1.0)
        out = torch.empty_like(q, dtype=torch.bfloat16)
        attention_specialised(q, k, transposed(k.shape, "cpu"), out, None, scales)
    else:
        attention_specialised(q, k, k, torch.empty_like(q))
with tempfile.NamedTemporaryFile() as file:  # Triton's own listing ends at lines that it does not know
    file.write(collected.kernels[0][1].asm["cubin"])
    file.flush()
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
    print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
"""


def code(head_dim: int, dtype: str) -> str:
    """SASS, of a process of its own: one that has a fake driver can launch nothing more."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("liverelay.kernels.attention_gluon", exc_type=ImportError)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not all((tools / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")):
        pytest.skip("this triton has no assembler or no disassembler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(head_dim=head_dim, dtype=dtype)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize(("head_dim", "dtype"), [
    (128, "bfloat16"), (64, "bfloat16"), (128, "float16"), (128, "float8_e4m3fn"), (64, "float8_e4m3fn"),
])  # fmt: skip
def test_softmax_lies_between_the_waits_for_both_products(head_dim: int, dtype: str) -> None:
    """The order that the inner loop is written for, and that the assembler could change: see the comment there."""
    sass = code(head_dim, dtype)
    assert not re.search(r"\b(LDL|STL)\b", sass) and "USETMAXREG" in sass and "UTMALDG" in sass and "UTMASTG" in sass
    loops = re.findall(r"DEPBAR\.LE gsb0, 0x1 ;(.*?)DEPBAR\.LE gsb0, 0x0", sass, re.DOTALL)
    assert len(loops) == 2  # one for each group of warps
    for loop in loops:
        assert loop.count("MUFU.EX2") >= 64 and "GMMA" not in loop
    if (head_dim, dtype) == (128, "float8_e4m3fn"):  # the last tile's sum is added while the next first product runs
        for before in sass.split("DEPBAR.LE gsb0, 0x1 ;")[:-1]:
            running = before.rpartition("DEPBAR")[2].partition("GMMA")[2]
            assert len(re.findall(r"\b(?:FFMA|FMUL)\b", running)) >= 32
    if dtype.startswith("float8"):  # both products in FP8, and no byte of a weight is moved
        assert "QGMMA" in sass and "HGMMA" not in sass and sass.count("PRMT") < 16
