"""What is installed: the right names and no others, with and without the compiled module."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from liverelay.engine import __version__, native

ROOT = Path(__file__).resolve().parents[1]
COMPILED = pytest.mark.skipif(native.module() is None, reason="the compiled module was not built")
MISSING = [name for name in ("pip", "setuptools", "pybind11") if importlib.util.find_spec(name) is None]
BUILD_TOOLS = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
NOT_SOURCES = (".git", ".venv*", "build", "dist", "demo", "out", "*.egg-info", "*.so", "__pycache__", ".*_cache")


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def copy_of_the_sources(folder: Path) -> Path:
    """Only what the repository holds: no build folder, no compiled module, no egg-info."""
    skip = shutil.ignore_patterns(*NOT_SOURCES)
    return Path(shutil.copytree(ROOT, folder / "sources", ignore=skip, symlinks=True))


@COMPILED
def test_the_compiled_module_is_of_this_version() -> None:
    module = native.module()
    assert module is not None and module.version == __version__
    info = native.build_info()
    assert info["kind"] == "native" and info["version"] == __version__
    assert int(info["cxx"]) >= 201703 and info["compiler"]


def test_without_the_compiled_module_the_twin_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liverelay.engine._C", None)
    info = native.build_info()
    assert info["kind"] == "python" and info["version"] == __version__


def test_every_public_name_is_there_and_the_frame_ring_needs_no_torch() -> None:
    code = "import sys, liverelay.engine as e; print('numpy' in sys.modules, e.FrameRing.__name__, "
    code += "'torch' in sys.modules, all(hasattr(e, name) for name in e.__all__))"
    assert python("-c", code, cwd=ROOT).stdout.split() == ["False", "FrameRing", "False", "True"]


@COMPILED
def test_the_stub_says_what_the_compiled_module_holds(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    module = native.module()
    assert module is not None and module.__file__ is not None
    for file in (Path(module.__file__), ROOT / "engine" / "_C.pyi"):  # alone: the package would bring torch's types
        shutil.copy(file, tmp_path)
    python("-m", "mypy.stubtest", "_C", cwd=tmp_path, MYPYPATH=str(tmp_path))


@BUILD_TOOLS
@pytest.mark.slow
def test_a_wheel_from_the_sdist_installs_our_names_and_no_others(tmp_path: Path) -> None:
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than 77")
    sources = copy_of_the_sources(tmp_path)
    python("-c", "import setuptools.build_meta as b; b.build_sdist('dist')", cwd=sources)
    (sdist,) = (sources / "dist").glob("*.tar.gz")
    pip = ("-m", "pip", "-q", "--disable-pip-version-check")
    python(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = [path for folder in ("engine", "kernels") for path in (ROOT / folder).rglob("*.py")]
    modules = {f"liverelay/{path.relative_to(ROOT).as_posix()}" for path in ours}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in names} == {"liverelay"}
    bundled = [path for path in (ROOT / "engine" / "bundled").rglob("*") if path.is_file()]
    assert bundled and {f"liverelay/{path.relative_to(ROOT).as_posix()}" for path in bundled} <= names
    assert any("/engine/_C." in name and not name.endswith(".pyi") for name in names)

    site = tmp_path / "site"
    python(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    code = "import liverelay.engine._C as c, liverelay.kernels.dispatch as d; print(c.__file__, d.__file__, c.version)"
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.stdout.count(str(site)) == 2 and done.stdout.split()[-1] == __version__
    assert not (site / "engine").exists() and not (site / "kernels").exists()


@BUILD_TOOLS
def test_a_failing_compiler_is_a_warning_only(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "cmake"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexit 1\n")
    tool.chmod(0o755)
    sources = copy_of_the_sources(tmp_path)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    done = python("setup.py", "build_ext", "--inplace", cwd=sources, PATH=path)
    assert "liverelay works without its compiled module" in done.stdout + done.stderr
    assert not list((sources / "engine").glob("*.so"))
