"""Reads the machine code of sm_90 as nvdisasm prints it: blocks, natural loops, the pipe of each instruction.

A natural loop is a branch back to a block that dominates it, with all that leads to the branch without passing that
block, the loop's head. The usual way through a loop is the shortest from its head back to it that takes all its
products: it leaves out spins on a barrier and every `if`, also one that is mostly taken.

Nsight Compute's Kernel Profiling Guide (Pipelines) tells which pipe executes what. It is silent about F2FP on Hopper:
ptxas gives it no scoreboard and keeps two of them two cycles apart, as with the ALU's instructions; F2F, F2I and I2F
have scoreboards as MUFU has. An IMAD that only moves is a move. A product of 256 bits of depth takes M N / 128 cycles:
4096 FLOPs a cycle and SM in 16 bits (989 TFLOP/s with 132 SMs at 1830 MHz, by the H100 white paper), twice that in 8.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LABEL = re.compile(r"^([.\w$]+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@(!?\w+)\s+)?([A-Z]\w*)([.\w]*)\s*(.*?)\s*;")
TARGETS = re.compile(r"`\(([^)]+)\)|(\.L_\w+)")
SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
BRANCHES, ENDS = ("BRA", "BRX", "JMP", "JMX", "CALL"), ("EXIT", "RET")
PIPES = {
    "tensor": "HGMMA QGMMA IGMMA BGMMA HMMA IMMA DMMA",
    "xu": "MUFU F2F F2I I2F FRND POPC FLO",
    "fma": "FFMA FMUL FADD HFMA2 HMUL2 HADD2",
    "imad": "IMAD IDP",
    "alu": "FMNMX FSEL FSETP FSET FCHK HMNMX2 HSETP2 ISETP IADD3 VIADD VIMNMX VIADDMNMX IMNMX IABS LOP3 LEA SHF SEL"
    " PRMT PLOP3 SGXT BMSK P2R R2P BREV",
    "convert": "F2FP F2IP I2FP I2IP",
    "shared": "LDS STS LDSM STSM ATOMS",
    "shuffle": "SHFL MOVM REDUX",
    "memory": "LDG STG LDGSTS LD ST LDL STL LDC ATOM ATOMG RED UTMALDG UTMASTG UTMAREDG UTMAPF UBLKCP CCTL",
    "sync": "SYNCS BAR WARPSYNC WARPGROUP DEPBAR LDGDEPBAR UTMACMDFLUSH MEMBAR FENCE ERRBAR BSSY BSYNC BREAK BMOV ELECT"
    " VOTE VOTEU MATCH NANOSLEEP YIELD USETMAXREG",
    "control": "BRA BRX JMP JMX CALL RET EXIT NOP BPT",
    "move": "MOV CS2R S2R S2UR R2UR",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
NAMES = (*PIPES, "uniform", "other")
Loop = tuple[int, set[int]]  # the head, and all blocks with it


# -- blocks and loops -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """`@guard name.modifiers operands`."""

    guard: str
    name: str
    modifiers: str
    operands: str

    @property
    def pipe(self) -> str:
        if self.name == "IMAD" and ".MOV" in self.modifiers:
            return "move"
        return PIPE_OF.get(self.name, "uniform" if self.name.startswith("U") else "other")

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, N and K of a product that four warps start together; zeros of all else."""
        found = SHAPE.search(self.modifiers) if self.name.endswith("GMMA") else None
        return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.shape)

    @property
    def tensor_cycles(self) -> int:
        return math.prod(self.shape[:2]) // 128

    @property
    def conditional(self) -> bool:
        """Whether a branch may also fall through: it has a predicate, or an operand beside its target."""
        return self.guard not in ("", "PT") or self.name == "CALL" or (self.name == "BRA" and "," in self.operands)


@dataclass
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may come next."""

    code: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    @property
    def multiplies(self) -> bool:
        return any(instruction.flops for instruction in self.code)


def parse(text: str) -> list[Block]:
    """Blocks of one function from nvdisasm's text; the first one is the entry."""
    blocks, places = [Block()], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            if blocks[-1].code:
                blocks.append(Block())
            places[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            blocks[-1].code.append(Instruction(found[1] or "", *found.group(2, 3, 4)))
            if found[2] in BRANCHES + ENDS:
                blocks.append(Block())
    for number, block in enumerate(blocks):
        last = block.code[-1] if block.code else Instruction("", "NOP", "", "")
        if last.name in BRANCHES:
            block.after = [places[a or b] for a, b in TARGETS.findall(last.operands) if (a or b) in places]
        if (last.name not in BRANCHES + ENDS or last.conditional) and number + 1 < len(blocks):
            block.after.append(number + 1)
    return blocks


def reachable(blocks: Sequence[Block], without: int = -1) -> set[int]:
    """Blocks that the entry leads to, on ways around one of them."""
    seen: set[int] = set()
    rest = [0]
    while rest:
        if (number := rest.pop()) not in seen and number != without:
            seen.add(number)
            rest += blocks[number].after
    return seen


def loops(blocks: Sequence[Block]) -> dict[int, set[int]]:
    """The natural loops: blocks of each by its head. A head dominates what only it leads to."""
    live = reachable(blocks)
    before: dict[int, set[int]] = {number: set() for number in live}
    for number in live:
        for after in blocks[number].after:
            before[after].add(number)
    found: dict[int, set[int]] = {}
    for head in sorted(live):
        dominated = live - reachable(blocks, without=head)
        if tails := before[head] & dominated:
            body, rest = {head}, list(tails)
            while rest:
                if (number := rest.pop()) not in body:
                    body.add(number)
                    rest += before[number]
            found[head] = body
    return found


def shortest(blocks: Sequence[Block], loop: Loop, start: int, stop: int) -> list[int]:
    """Blocks after `start` up to `stop` on the shortest way; none where only another turn leads there."""
    head, body = loop
    queue: list[tuple[int, list[int]]] = [(0, [start])]
    seen: set[int] = set()
    while queue:
        cost, way = heapq.heappop(queue)
        if way[-1] == stop and len(way) > 1:
            return way[1:]
        if len(way) > 1 and way[-1] in seen | {head}:
            continue
        seen.add(way[-1])
        for after in body.intersection(blocks[way[-1]].after):
            heapq.heappush(queue, (cost + len(blocks[after].code), [*way, after]))
    return []


def usual_way(blocks: Sequence[Block], loop: Loop) -> list[int]:
    """Blocks of the shortest turn through all products."""
    head, body = loop
    way = [head]
    for stop in sorted(number for number in body if blocks[number].multiplies):
        if stop not in way:  # `shortest` finds none where two products stand in an `if` and its `else`
            way += shortest(blocks, loop, way[-1], stop)
    return way + shortest(blocks, loop, way[-1], head)[:-1]


def product_loops(blocks: Sequence[Block]) -> list[Loop]:
    """Loops with products and without another such loop in them."""
    found = [(head, body) for head, body in loops(blocks).items() if any(blocks[n].multiplies for n in body)]
    return [(head, body) for head, body in found if not any(other in body and other != head for other, _ in found)]


# -- counts -----------------------------------------------------------------------------------------------------------


def pipes_of(code: Iterable[Instruction]) -> dict[str, int]:
    counts = Counter(instruction.pipe for instruction in code)
    return {name: counts[name] for name in NAMES}


def code_of(blocks: Sequence[Block], numbers: Iterable[int]) -> list[Instruction]:
    return [instruction for number in numbers for instruction in blocks[number].code]


def accesses(code: Iterable[Instruction]) -> dict[str, int]:
    """Global loads and stores by width in bits."""
    kinds = {"LDG": "load", "LD": "load", "LDGSTS": "load", "STG": "store", "ST": "store"}
    counts: Counter[str] = Counter()
    for instruction in code:
        if kind := kinds.get(instruction.name):
            width = re.search(r"\.[US]?(128|64|16|8)\b", instruction.modifiers)
            counts[f"{kind} {width[1] if width else 32}"] += 1
    return dict(sorted(counts.items()))
