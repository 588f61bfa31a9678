"""The house: what is installed under which name, and who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import pytest

from farspan.models.config import ModelConfig, preset_names
from farspan.parallel.cluster import cluster_names, load_cluster
from farspan.trainer.config_file import load_config

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
ROOMS = [path.parent.name for path in sorted(ROOT.glob("*/__init__.py"))]
LAYERS = [{"kernels"}, {"parallel"}, {"models", "data"}, {"trainer"}, {"launch"}]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PRESETS = [path for path in CONFIGS if path.parent.name == "models"]
CLUSTERS = [path for path in CONFIGS if path.parent.name == "clusters"]
RUNS = [path for path in CONFIGS if path not in [*PRESETS, *CLUSTERS]]
DEPENDENCIES: list[str] = [
    *PROJECT["project"]["dependencies"],
    *PROJECT["project"]["optional-dependencies"]["dev"],
]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_under_its_name_from_this_checkout(package: str) -> None:
    folder = ROOT.joinpath(*package.split(".")[1:])
    assert list(import_module(package).__path__) == [str(folder)]


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {".".join(("farspan", *folder.parts)) for folder in folders} == set(PACKAGES)
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {f"farspan.{room}": room for room in ROOMS}


def test_every_yaml_file_and_the_table_of_rates_are_package_data() -> None:
    folders = {path.parent.relative_to(ROOT) for path in CONFIGS}
    listed = PROJECT["tool"]["setuptools"]["package-data"]
    yaml = {".".join(("farspan", *folder.parts)): ["*.yaml"] for folder in folders}
    assert listed == yaml | {"farspan.kernels": ["rates.json"]}


def test_no_generic_name_is_installed(tmp_path: Path) -> None:
    assert (distribution("farspan").read_text("top_level.txt") or "").split() == ["farspan"]
    code = "import sys; from importlib.util import find_spec as find; print([str(find(n)) for n in sys.argv[1:]])"
    names = [*ROOMS, "tests", "support", "typings"]
    found = subprocess.run([sys.executable, "-I", "-c", code, *names], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert str(ROOT) not in found.stdout


def test_mypy_sees_every_room_with_code_under_its_name() -> None:
    links = {link.name: link.resolve() for link in (ROOT / "typings" / "farspan").iterdir()}
    assert links == {room: ROOT / room for layer in LAYERS for room in layer}


def test_imports_only_go_down() -> None:
    """launch -> trainer -> {models, data} -> parallel -> kernels; models and data do not know each other."""
    allowed: set[str] = set()
    wrong = []
    for layer in LAYERS:
        for room in layer:
            for path in (ROOT / room).rglob("*.py"):
                found = set(imported_rooms(path.read_text(), path.relative_to(ROOT))) - allowed - {room}
                wrong += [f"{path.relative_to(ROOT)} imports {other}" for other in sorted(found)]
        allowed |= layer
    assert wrong == []
    assert {*allowed, "configs"} == set(ROOMS)  # configs holds YAML only


def test_no_module_is_imported_by_its_bare_folder_name() -> None:
    """`import kernels` works where the checkout happens to be the working folder, and nowhere else."""
    wrong = []
    for path in (path for room in [*ROOMS, "tests"] for path in (ROOT / room).rglob("*.py")):
        names = {name.partition(".")[0] for name in imported_modules(path.read_text(), path.relative_to(ROOT))}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(names & set(ROOMS))]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        "import farspan.trainer.config as c",
        "from farspan import kernels, trainer",
        "from farspan.trainer import config",
        "from ...trainer import config",
        "from ... import trainer",
        "def f():\n    from farspan.trainer.config import load_config",
    ],
)
def test_an_import_is_recognised_in_every_form(source: str) -> None:
    assert "trainer" in set(imported_rooms(source, Path("parallel/plans/ring.py")))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_model_preset_loads(path: Path) -> None:
    model = ModelConfig.model_validate({"vocabulary_size": 1000, "preset": path.stem})
    assert model.parameters() > 0
    assert path.stem in preset_names()


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_cluster_loads_by_name_and_by_path(path: Path) -> None:
    assert path.stem in cluster_names()
    assert load_cluster(path.stem) == load_cluster(str(path))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads(path: Path) -> None:
    load_config(path)


def test_the_configurations_of_the_readme_load(tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        path = tmp_path / "readme.yaml"
        path.write_text(block)
        load_config(path)


def test_every_direct_dependency_is_pinned_and_explained() -> None:
    direct = {canonical(re.split(r"[^\w.-]", requirement)[0]) for requirement in DEPENDENCIES}
    pinned = re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    explained = re.findall(r"^\| ([\w.-]+) +\|", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE)
    assert direct <= {canonical(name) for name in pinned}
    assert direct <= {canonical(name) for name in explained}


def imported_rooms(source: str, path: Path) -> Iterator[str]:
    """The rooms of farspan that a file's source imports from; `path` is the file's place in the checkout."""
    for name in imported_modules(source, path):
        first, *rest = name.split(".")
        if first == "farspan" and rest:
            yield rest[0]


def imported_modules(source: str, path: Path) -> Iterator[str]:
    """Full names of everything imported anywhere in a file, also inside functions."""
    package = ("farspan", *path.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
