"""What an installation contains."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEMO = {
    str(path.relative_to(ROOT / "weights" / "demo"))
    for path in (ROOT / "weights" / "demo").rglob("*")
    if path.is_file()
}
# Of another installation's settings nothing may leak into what is run here.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_every_package_is_listed():
    """The list is written out because of the demo, which lies elsewhere; a new package has to be added to it."""
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "mlx_ltx").rglob("__init__.py")}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == folders | {"mlx_ltx._demo"}


def copy_sources(folder):
    """What a build needs, away from the checkout, so that nothing is left in it and nothing old gets into the wheel."""
    for name in ("mlx_ltx", "weights"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)


def build(folder, what):
    """Run the build backend in ``folder`` as pip would, without its network; the path of what it made."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}('out'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "out" / done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_wheel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    copy_sources(source)
    with zipfile.ZipFile(build(source, "wheel")) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    assert {name.removeprefix("mlx_ltx/_demo/") for name in names if name.startswith("mlx_ltx/_demo/")} == DEMO
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mlx_ltx").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert not [name for name in names if name.startswith(("weights/", "tests/", "scripts/"))]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "from mlx_ltx.checkpoints.resolve import resolve_model; from mlx_ltx.checkpoints.catalogue import demo_folder;"
        "files = resolve_model('demo'); print(demo_folder()); print(files.checkpoint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    demo = tmp_path / "site" / "mlx_ltx" / "_demo"
    assert done.stdout.split() == [str(demo), str(demo / "ltx-2.3-demo.safetensors")]


@pytest.mark.slow
def test_source_distribution(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    copy_sources(source)
    with tarfile.open(build(source, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert {f"weights/demo/{name}" for name in DEMO} <= names
    assert "pyproject.toml" in names
    # A wheel made from it is as complete as one made from the repository.
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build(unpacked, "wheel")) as wheel:
        inside = {name.removeprefix("mlx_ltx/_demo/") for name in wheel.namelist() if "/_demo/" in name}
    assert inside == DEMO
