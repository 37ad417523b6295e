from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import retrofit

ROOT = Path(__file__).resolve().parent.parent


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_is_light() -> None:
    code = "import sys, retrofit, retrofit.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert _python(code) == "[]\n"


def test_kernels_and_passes_are_links_without_a_package_at_the_root() -> None:
    for name in ("kernels", "passes"):
        assert (ROOT / "retrofit" / name).is_symlink()
        assert (ROOT / "retrofit" / name).resolve() == ROOT / name
        # A root kernels/__init__.py shadows Hugging Face's package of that name and breaks transformers.
        assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("name", retrofit.__all__)
def test_every_public_name_resolves_to_what_it_names(name: str) -> None:
    value = getattr(retrofit, name)
    assert callable(value)
    assert value.__module__.startswith("retrofit.")
    assert value.__doc__


def test_functions_keep_their_names_when_a_module_has_the_same() -> None:
    code = (
        "import retrofit.distill, retrofit.evaluate, retrofit, types\n"
        "from retrofit import distill, evaluate\n"
        "print([isinstance(x, types.FunctionType) for x in (distill, evaluate, retrofit.distill)])"
    )
    assert _python(code) == "[True, True, True]\n"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'covnert'; it has"):
        retrofit.covnert  # noqa: B018


def test_constraints_pin_every_direct_requirement() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|datasets|gpu|report|dev) = \[(.*?)\]\n", project, re.S | re.M)
    required = set(re.findall(r'"([A-Za-z][\w-]*)>=', "".join(lists)))
    pinned = set(re.findall(r"^([A-Za-z][\w-]*)==", (ROOT / "constraints.txt").read_text(), re.M))
    assert len(required) > 15
    assert required <= pinned


def test_requirements_are_ranges() -> None:
    assert "==" not in re.sub(r"platform_system ==", "", (ROOT / "pyproject.toml").read_text())
