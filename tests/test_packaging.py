"""The wheel holds the package and the data files, and finds them once unpacked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgeprune import __version__
from edgeprune.cli import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source") / "edgeprune"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("edgeprune", "targets", "profiles"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


def test_wheel_name(wheel: Path) -> None:
    assert wheel.name == f"edgeprune-{__version__}-py3-none-any.whl"


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    listed = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "edgeprune").rglob("*.py")}
    assert len(modules) > 20
    assert modules <= listed
    for kind in ("targets", "profiles"):
        data = {f"edgeprune/_data/{kind}/{p.name}" for p in (ROOT / kind).glob("*.toml")}
        assert data
        assert data == {n for n in listed if n.startswith(f"edgeprune/_data/{kind}/")}
    assert not [n for n in listed if n.startswith(("tests/", "scripts/"))]
    assert f"edgeprune-{__version__}.dist-info/licenses/LICENSE" in listed


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"edgeprune-{__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        entry = archive.read(f"{folder}/entry_points.txt").decode()
    assert "edgeprune = edgeprune.cli.main:main" in entry
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    base = {line.split()[1].split(">")[0].split(";")[0] for line in needed if "extra ==" not in line}
    assert base == {"click", "rich", "jinja2", "numpy", "scipy", "tomli"}


def test_an_unpacked_wheel_finds_its_data(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import edgeprune\n"
        "from edgeprune.config import targets, profiles, toml\n"
        "print(toml.data_folder('targets'))\n"
        "print(len(targets.list_targets()), len(profiles.list_profiles()))\n"
        "print(targets.load_target('jetson-orin', memory_bytes=6_000_000_000)[0].name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stderr == ""
    folder, counts, taken = done.stdout.splitlines()
    assert folder == str(tmp_path / "edgeprune" / "_data" / "targets")
    assert (
        counts
        == f"{len(list((ROOT / 'targets').glob('*.toml')))} {len(list((ROOT / 'profiles').glob('*.toml')))}"
    )
    assert taken == "jetson-orin-nano-8gb"


def test_doctor_knows_the_extras_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for name, distributions in doctor.EXTRAS.items():
        assert tuple(d.split(">")[0] for d in extras[name]) == distributions
    assert set(extras) == set(doctor.EXTRAS) | {"all", "dev"}
    assert {d.split(">")[0].split(";")[0] for d in project["dependencies"]} - {"tomli"} == set(doctor.BASE)


def test_scripts_refuse_in_one_line_without_python(tmp_path: Path) -> None:
    """A checkout without .venv on a machine with neither python nor compiler: exit 5, what is missing."""
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("_setup.sh", "edgeprune"):
        shutil.copy(ROOT / "scripts" / name, checkout / "scripts" / name)
    shutil.copy(ROOT / "pyproject.toml", checkout / "pyproject.toml")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "cat", "cksum", "dirname", "readlink", "df", "awk", "flock", "mkdir", "rm"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    done = subprocess.run(
        [str(checkout / "scripts" / "edgeprune"), "targets"],
        capture_output=True,
        text=True,
        env={"PATH": str(tools)},
        timeout=60,
    )
    assert done.returncode == 5
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error.startswith("Error: missing: python 3.10 or newer")
    assert "a C++ compiler" in error
    assert hint == "Hint: install it and run the same command again"
    assert not (checkout / ".venv").exists()
