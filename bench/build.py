"""`python -m bench.build`: the compiled module `liverelay.engine._C`, built in place where it is missing or too old.

`setup.py` takes a module that cannot be built for a warning; here it is a failure, because on a GPU's day nothing may
quietly run on a twin.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBE = "import liverelay.engine._C as module; print(module.__file__)"


def built() -> Path | None:
    """The module as a new process finds it; None where it cannot be imported, or is that of another checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT / ".links"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    found = Path(done.stdout.strip()).resolve()
    return found if done.returncode == 0 and found.parent == ROOT / "engine" else None


def sources() -> list[Path]:
    return [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")] + [ROOT / "CMakeLists.txt"]


def main() -> int:
    found = built()
    if found is not None and found.stat().st_mtime >= max(path.stat().st_mtime for path in sources()):
        print(f"{found.name} is newer than its sources")
        return 0
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = built()
    if found is None:
        print(done.stdout + done.stderr)
        print("the compiled module could not be built, or cannot be imported")
        return 1
    print(f"built {found.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
