"""The rules of the code: who imports whom, sizes, one place for the environment, no text twice.

Every rule is a function from sources (path -> text) to violations, tested on a text that breaks it and on ours.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "kernels", "bench", "distill", "samples", "tests")
FILE_LINES, FUNCTION_LINES, JIT_LINES, PARAMETERS, WINDOW = 400, 60, 150, 8, 15
CORE = {"torch", "numpy", "safetensors", "triton", "liverelay", "__future__"} | sys.stdlib_module_names
ENVIRONMENT = {"engine/config.py"}  # the only files that may read the environment

# A module of the engine imports only from rows above its own. A new module gets its place here.
LAYERS = (
    "errors version progress arguments models.convolution models.sampler models relay relay.scheduler relay.links",
    "relay.card_times",
    "frame_ring_layout",
    "config devices relay.dispatch native media models.geometry models.lora models.image models.vae_config",
    "models.sizes frame_ring_twin relay.plan",
    "relay.times relay.room frame_ring cache_folder",
    "relay.planner",
    "cache models.weights models.vae_layers models.workspace",
    "checkpoint models.layers models.audio models.text models.vae",
    "models.dit models.audio_live models.log_mel",
    "models.attention_choice",
    "inspection prompts snapshot relay.messages relay.handoff relay.graph",
    "relay.stage",
    "relay.loop relay.captured",
    "relay.native_loop",
    "relay.pipeline relay.remote loading",
    "relay.group",
    "relay.ranks",
    "stream telemetry relay.simulator",
    "session steps",
    "engine",
    "make_checkpoint recovery launch quantize",
    "generate serving serving.protocol",
    "serving.sockets",
    "serving.states",
    "serving.worker",
    "serving.connection",
    "serving.server",
    "golden",
    "golden.audio golden.dit golden.image golden.lora golden.text golden.vae",
    "golden.tpp serving.command",
    "timeline",
    "planning",
    "cli",
    "__main__ __init__",
)
# What runs before any stage does may turn a switch: OpenMP reads the environment when torch is imported, and the number
# of CPU threads is the user's choice for the command's whole process. An engine that is embedded calls neither.
START_UP = [("engine/config.py", "set_process_defaults"), ("engine/devices.py", "set_threads")]
SWITCH = re.compile(
    r"torch\.backends\.|torch\.set_|torch\.use_deterministic|torch\._C\._set_|torch\.cuda\.set_(?!device$|stream$)"
    r"|(.*\.)?sdpa_kernel$|os\.(putenv|unsetenv|environ\.(update|setdefault|pop|popitem|clear|__))"
)
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row.split()}
Sources = dict[str, str]


def module_name(path: str) -> str:
    """engine/models/dit.py -> models.dit; engine/golden/__init__.py -> golden; engine/__init__.py -> __init__."""
    parts = Path(path).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(tree: ast.AST, *, top: bool = False) -> Iterator[str]:
    """Dotted names that the code imports, but for the type checker's own; `top`: only when it is itself imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif not (top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top=top)


def import_direction(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        if not path.startswith("engine/"):
            continue
        name = module_name(path)
        if name not in LEVEL:
            yield f"{path}: has no row in LAYERS"
            continue
        for target in imports(ast.parse(text)):
            if not target.startswith("liverelay.engine."):
                continue
            rest = target.removeprefix("liverelay.engine.").split(".")
            while rest and ".".join(rest) not in LEVEL:
                rest.pop()  # the last part is a name of the module, not a module
            other = ".".join(rest) or "__init__"
            if LEVEL[other] >= LEVEL[name]:
                yield f"{path}: imports {other}, which is not above it in LAYERS"


def foreign_imports(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        tree = ast.parse(text)
        for target in imports(tree):
            first = target.split(".")[0]
            if first in ("engine", "kernels", ""):
                yield f"{path}: imports {target}; write liverelay.engine or liverelay.kernels"
            if path.startswith("kernels/") and target.startswith("liverelay.engine"):
                yield f"{path}: kernels never import the engine"
            if path.startswith(("engine/", "kernels/")) and first in ("bench", "distill"):
                yield f"{path}: imports {target}, which is not installed"
        if path.startswith(("engine/", "kernels/")):
            for target in imports(tree, top=True):
                if target.split(".")[0] not in CORE | {"engine", "kernels"}:
                    yield f"{path}: imports {target} at import time; optional libraries belong into the function"


def environment(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        if path in ENVIRONMENT or not path.startswith(("engine/", "kernels/")):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
                yield f"{path}:{node.lineno}: the environment is read in {', '.join(ENVIRONMENT)} only"


def process_switches(sources: Sources) -> Iterator[str]:
    """Stages and engines compute in threads of one process: a switch of the process is turned at start or never."""
    for path, text in sources.items():
        if not path.startswith(("engine/", "kernels/")):
            continue
        for name, line in switched(ast.parse(text), [function for file, function in START_UP if file == path]):
            yield f"{path}:{line}: {name} holds for the whole process, and other threads compute meanwhile"


def switched(tree: ast.AST, start_up: list[str]) -> Iterator[tuple[str, int]]:
    """What the code turns for the whole process, outside the functions that run at start."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name in start_up:
            continue
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for name in imports(ast.Module([node], [])):
                # Under another name it would not be recognised where it is used.
                if name.startswith(("torch.backends.", "torch.set_", "torch.nn.attention.")):
                    yield name, node.lineno
        for target in targets:
            name = ast.unparse(target)
            if name.startswith(("torch.backends.", "os.environ", "triton.knobs.")):
                yield name, node.lineno
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            reads = name.rsplit(".", 1)[-1] in ("is_available", "version") or name.endswith("_enabled")
            if SWITCH.match(name) and not reads:
                yield name, node.lineno
        yield from switched(node, start_up)


def sizes(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        lines = text.count("\n") + 1
        if lines > FILE_LINES + 1:
            yield f"{path}: {lines} lines, at most {FILE_LINES}"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            length, limit = (node.end_lineno or 0) - node.lineno + 1, JIT_LINES if jit else FUNCTION_LINES
            if length > limit:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {limit}"
            a = node.args
            given = [arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs) if arg.arg not in ("self", "cls")]
            if len(given) > PARAMETERS and not jit:
                yield f"{path}:{node.lineno}: {node.name} has {len(given)} parameters, at most {PARAMETERS}"


def repetition(sources: Sources) -> Iterator[str]:
    seen: dict[tuple[str, ...], str] = {}
    for path, text in sources.items():
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for start in range(len(lines) - WINDOW + 1):
            window = tuple(lines[start : start + WINDOW])
            if seen.setdefault(window, path) != path:
                yield f"{path}: {WINDOW} lines from '{window[0]}' on also stand in {seen[window]}"
                break


Rule = Callable[[Sources], Iterator[str]]
BODY = "".join(f"    x{i} = {i}\n" for i in range(70))
BROKEN: list[tuple[Rule, Sources]] = [
    (import_direction, {"engine/cache.py": "from liverelay.engine.session import Session"}),
    (import_direction, {"engine/cache.py": "def f():\n    import liverelay.engine.cli"}),
    (import_direction, {"engine/models/dit.py": "from liverelay.engine.models import dit, audio_live"}),
    (import_direction, {"engine/media.py": "from liverelay.engine import Engine"}),
    (import_direction, {"engine/brand_new.py": ""}),
    (foreign_imports, {"kernels/a.py": "import liverelay.engine.errors"}),
    (foreign_imports, {"tests/a.py": "import kernels.dispatch"}),
    (foreign_imports, {"engine/a.py": "from engine import cli"}),
    (foreign_imports, {"engine/a.py": "from .cli import main"}),
    (foreign_imports, {"engine/a.py": "import transformers"}),
    (foreign_imports, {"engine/a.py": "def f():\n    from distill.portrait import render"}),
    (foreign_imports, {"engine/a.py": "try:\n    import av\nexcept ImportError:\n    av = None"}),
    (environment, {"engine/a.py": "import os\nx = os.environ['A']"}),
    (environment, {"kernels/a.py": "import os\nx = os.getenv('A')"}),
    (process_switches, {"kernels/a.py": "import torch\nwith torch.nn.attention.sdpa_kernel(x):\n    f()"}),
    (process_switches, {"kernels/a.py": "from torch.nn.attention import SDPBackend, sdpa_kernel"}),
    (process_switches, {"engine/a.py": "def f():\n    with torch.backends.cudnn.flags(enabled=True):\n        g()"}),
    (process_switches, {"engine/a.py": "torch.backends.cuda.enable_flash_sdp(False)"}),
    (process_switches, {"engine/a.py": "def f():\n    torch.backends.cudnn.allow_tf32 = False"}),
    (process_switches, {"engine/a.py": "from torch.backends import cudnn"}),
    (process_switches, {"engine/a.py": "import torch.backends.cudnn as quick"}),
    (process_switches, {"engine/a.py": "from torch import set_num_threads"}),
    (process_switches, {"engine/devices.py": "def other():\n    torch.set_num_threads(1)"}),
    (process_switches, {"engine/a.py": "torch.set_float32_matmul_precision('high')"}),
    (process_switches, {"engine/a.py": "torch.use_deterministic_algorithms(True)"}),
    (process_switches, {"engine/a.py": "torch.cuda.set_sync_debug_mode(1)"}),
    (process_switches, {"engine/config.py": "def f():\n    os.environ['A'] = 'b'"}),
    (process_switches, {"engine/config.py": "def f():\n    os.environ.setdefault('A', 'b')"}),
    (process_switches, {"engine/config.py": "def f():\n    del os.environ['A']"}),
    (process_switches, {"engine/config.py": "def f():\n    os.putenv('A', 'b')"}),
    (sizes, {"engine/a.py": "x = 1\n" * 401}),
    (sizes, {"engine/a.py": "def f():\n" + BODY}),
    (sizes, {"kernels/a.py": "@triton.jit\ndef f():\n" + BODY * 3}),
    (sizes, {"engine/a.py": "def f(a, b, c, d, e, *, f, g, h, i): ..."}),
    (repetition, {"engine/a.py": "def f():\n" + BODY, "kernels/b.py": "def g():\n" + BODY}),
]
ALLOWED: list[tuple[Rule, Sources]] = [
    (import_direction, {"engine/cli.py": "from liverelay.engine.models.weights import save_tensors"}),
    (import_direction, {"engine/session.py": "if TYPE_CHECKING:\n    from liverelay.engine.engine import Engine"}),
    (foreign_imports, {"engine/a.py": "def f():\n    import transformers"}),
    (environment, {"engine/config.py": "import os\nx = os.environ['A']"}),
    (process_switches, {"engine/config.py": "def set_process_defaults():\n    os.environ.setdefault('A', 'b')"}),
    (process_switches, {"engine/devices.py": "def set_threads(n):\n    torch.set_num_threads(n)"}),
    (process_switches, {"engine/a.py": "torch.cuda.set_device(1)\nwith torch.inference_mode():\n    f()"}),
    (process_switches, {"engine/a.py": "with torch.cuda.stream(s):\n    x = torch.backends.cudnn.benchmark"}),
    (process_switches, {"engine/a.py": "x = torch.backends.cuda.is_available() or os.environ.get('A')"}),
    (process_switches, {"tests/a.py": "torch.set_num_threads(1)"}),
    (sizes, {"engine/a.py": "class A:\n    def f(self, a, b, c, d, e, f, g, h): ..."}),
    (sizes, {"engine/a.py": "x = 1\n" * 400, "kernels/a.py": "@triton.jit\ndef f():\n" + BODY}),
]
RULES: list[Rule] = [import_direction, foreign_imports, environment, process_switches, sizes, repetition]


@pytest.mark.parametrize(("rule", "sources"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_rule_is_seen(rule: Rule, sources: Sources) -> None:
    assert list(rule(sources))


@pytest.mark.parametrize(("rule", "sources"), ALLOWED, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_allowed_passes(rule: Rule, sources: Sources) -> None:
    assert not list(rule(sources))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_our_code_keeps_the_rule(rule: Rule) -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*paths, ROOT / "setup.py"]}
    assert len(sources) > 30
    violations = list(rule(sources))
    assert not violations, "\n".join(violations)


def test_kernels_is_no_regular_package() -> None:
    # With an __init__.py, running from the repository's root would hide the library of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_kernel_test_is_marked_slow() -> None:
    # `make test-slow` starts no process with Triton's interpreter, so such a test would run nowhere.
    assert not [path.name for path in (ROOT / "tests" / "kernels").glob("*.py") if "mark.slow" in path.read_text()]
