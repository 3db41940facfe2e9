"""Packaging: engine/ installs as liverelay.engine, kernels/ as liverelay.kernels, csrc/ builds liverelay.engine._C.

`liverelay` itself is a namespace package, so that no top-level `engine` or `kernels` is ever installed. The compiled
module is optional: where there is no compiler the install succeeds without it and Python twins take its place.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "engine" / "version.py").read_text())[1]
README = ROOT / "README.md"

# A plain `pip install torch` brings some GB of CUDA libraries also to a machine without a GPU. `make setup` therefore
# installs a CPU build first where there is no GPU (variable TORCH); any torch that is already there is left alone.
CORE = ["torch>=2.9", "numpy>=1.26", "safetensors>=0.5", "transformers>=5.0"]
EXTRAS = {
    "audio": ["soundfile>=0.13", "soxr>=0.5"],
    "view": ["rich>=13", "nvidia-ml-py>=12", "matplotlib>=3.8"],
    "text": ["ftfy>=6.1", "regex", "sentencepiece", "tokenizers"],
    "media": ["av>=15", "Pillow>=10"],
    "triton": ['triton>=3.4; platform_system == "Linux"'],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
# Voices for training data (distill/), which no user of the engine needs; libespeak-ng itself is under the GPL.
EXTRAS["distill"] = ["espeakng-loader>=0.2.4", *EXTRAS["text"], *EXTRAS["media"]]
# The kernels are proven with the Triton that GPU machines have today; register counts differ between versions.
EXTRAS["dev"] = [
    'triton==3.6.0; platform_system == "Linux"', "pytest>=8", "pytest-benchmark>=4", "ruff>=0.9", "mypy>=1.14",
    "pybind11>=2.13", "cmake>=3.25", "ninja",
]


def tool(name: str) -> str:
    """A build tool from PATH (pip puts its own there), else the one of a virtual environment that is not on PATH."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise CompileError(f"{name} is missing")
    return found


def generator() -> list[str]:
    """CMake's options for ninja, or for make where there is no ninja."""
    try:
        return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    except CompileError:
        return ["-G", "Unix Makefiles"]


class CMakeBuild(build_ext):
    """Builds the module with CMake. The module is optional, so setuptools turns a CompileError into a warning."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(work, ignore_errors=True)  # a cache that names another folder or interpreter would fail
        try:
            import pybind11

            subprocess.run([
                tool("cmake"), "-S", str(ROOT), "-B", str(work), *generator(), "-DCMAKE_BUILD_TYPE=Release",
                "-DLIVERELAY_PYTHON=ON", "-DLIVERELAY_LIBRARY=OFF", f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DLIVERELAY_VERSION={VERSION}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            ], check=True)
            subprocess.run([tool("cmake"), "--build", str(work), "--parallel", str(os.cpu_count() or 1)], check=True)
        except (ImportError, OSError, subprocess.SubprocessError) as error:
            raise CompileError(f"liverelay works without its compiled module, which was not built: {error}") from None


packages = {"liverelay.kernels": "kernels", "liverelay.engine": "engine"}
for folder in sorted(path.parent for path in (ROOT / "engine").glob("*/__init__.py")):
    packages[f"liverelay.engine.{folder.name}"] = f"engine/{folder.name}"

bundled = [str(path.relative_to(ROOT / "engine")) for path in (ROOT / "engine/bundled").rglob("*") if path.is_file()]

setup(
    name="liverelay",
    version=VERSION,
    description="Real-time inference engine for Live Avatar: audio-driven, endless video of a talking person",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list(packages),
    package_dir=packages,
    package_data={"liverelay.engine": ["_C.pyi", *bundled]},
    ext_modules=[Extension("liverelay.engine._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
    entry_points={"console_scripts": ["liverelay = liverelay.engine.cli:main"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
