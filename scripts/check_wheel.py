"""Checks what a user gets: builds sdist and wheel, installs the wheel alone and runs it from another folder.

    source tree → sdist → wheel → fresh environment → import retrofit.kernels, retrofit.passes; retrofit --help

`kernels/` and `passes/` reach the package through two symbolic links. A checkout without links builds a wheel
that lacks both folders and says nothing, so this runs on every change. The fresh environment borrows the
dependencies of the running interpreter, but not its editable install of retrofit: a folder named in a `.pth`
file is searched for modules, while the `.pth` files inside it are not read.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = """
import sys
from importlib import import_module
from pathlib import Path
for name in sys.argv[1:]:
    module = import_module(name)
    where = Path(module.__file__ or list(module.__path__)[0]).resolve()
    if not where.is_relative_to(Path(sys.prefix).resolve()):
        sys.exit(f"error: {name} came from {where}, expected the installed wheel in {sys.prefix}")
    print(f"{name}: {where.relative_to(Path(sys.prefix).resolve())}")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Runs ``command`` in ``cwd`` and returns its output; ends this script when it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(str(part) for part in command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def modules_in_tree() -> set[str]:
    """Returns every Python file that belongs into the wheel, as paths below the package."""
    links = {ROOT / "passes": "retrofit/passes", ROOT / "kernels": "retrofit/kernels"}
    found = {
        f"{inside}/{path.relative_to(folder).as_posix()}"
        for folder, inside in links.items()
        for path in folder.rglob("*.py")
    }
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "retrofit").rglob("*.py")}
    return found | own


def main() -> None:
    """Builds, installs and runs the package."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        run(sys.executable, "-m", "build", "--outdir", scratch / "dist", ROOT, cwd=scratch)
        (wheel,) = (scratch / "dist").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            missing = sorted(modules_in_tree() - set(archive.namelist()))
        if missing:
            sys.exit(
                f"error: {wheel.name} lacks {len(missing)} files of the source tree: {', '.join(missing)}"
            )
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, nothing missing")

        fresh = scratch / "fresh"
        run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=scratch)
        python = fresh / "bin" / "python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=scratch)
        variables = {"base": str(fresh), "platbase": str(fresh)}
        packages = Path(sysconfig.get_path("purelib", vars=variables))
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        print(run(python, "-c", IMPORTS, *sorted(packages_to_import()), cwd=scratch), end="")
        if "Usage: retrofit" not in run(fresh / "bin" / "retrofit", "--help", cwd=scratch):
            sys.exit("error: retrofit --help printed no usage")
        print("retrofit --help: ok")


def packages_to_import() -> set[str]:
    """Returns the package itself and each folder under kernels/ and passes/."""
    names = {"retrofit", "retrofit.kernels", "retrofit.passes", "retrofit.cli"}
    for top in ("kernels", "passes"):
        names |= {f"retrofit.{top}.{path.parent.name}" for path in (ROOT / top).glob("*/__init__.py")}
    return names


if __name__ == "__main__":
    main()
