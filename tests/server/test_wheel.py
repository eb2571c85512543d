"""The built wheel in a bare environment: what it holds, what it asks for, and that it works without the source tree."""

from __future__ import annotations

import email
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lockstep import __version__

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("vllm", "torch", "megatron-core", "transformers")
CHECK = """
import json, sys
import lockstep, lockstep_wire
from lockstep.inference.environment.locate import check_source, runtime_source
from lockstep.models.registry import list_model_support_specs
source = runtime_source()
check_source(source)
loaded = [name for name in ("torch", "megatron", "vllm", "transformers") if name in sys.modules]
print(json.dumps({"file": lockstep.__file__, "runtime": str(source.folder), "key": source.plugin_digest(),
    "families": len(list_model_support_specs()), "loaded": loaded}))
"""


def built(out: Path) -> tuple[Path, Path]:
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, "-m", "uv", "build", "--quiet", "--python", sys.executable, "--out-dir", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> tuple[Path, Path]:
    return built(tmp_path_factory.mktemp("dist"))


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(artifacts, tmp_path):
    again = built(tmp_path)
    assert [path.read_bytes() for path in artifacts] == [path.read_bytes() for path in again]


@pytest.mark.slow
def test_it_carries_the_servers_project_and_asks_for_no_server(artifacts):
    wheel, _ = artifacts
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(metadata_name))
        manifest = json.loads(archive.read("lockstep/_runtime/manifest.json"))
        for name, digest in manifest.items():
            assert hashlib.sha256(archive.read(f"lockstep/_runtime/{name}")).hexdigest() == digest
    bundled = {name.removeprefix("lockstep/_runtime/") for name in names if name.startswith("lockstep/_runtime/")}
    assert bundled - {"manifest.json"} == set(manifest)
    tracked = subprocess.run(["git", "ls-files", "runtime"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(manifest) == {name.removeprefix("runtime/") for name in tracked.stdout.split()}
    for needed in (
        "lockstep/py.typed",
        "lockstep/_examples/yes_no_maybe/task.py",
        "lockstep/cli/init/template/task.py",
        "lockstep/cli/report/assets/page.html",
        "lockstep_wire/plan.py",
    ):
        assert needed in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in always if line.lower().startswith(FORBIDDEN)]
    assert not [line for line in metadata.get_all("Requires-Dist", []) if line.lower().startswith("vllm")]
    assert metadata["Version"] == __version__
    assert {"train", "gguf", "examples", "tinker"} <= set(metadata.get_all("Provides-Extra", []))


def _pythons() -> list[str]:
    return [version for version in ("3.11", "3.12", "3.13") if _python(version)]


def _python(version: str) -> str | None:
    homes = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python"))
    return str(homes[-1]) if homes else shutil.which(f"python{version}")


@pytest.mark.slow
@pytest.mark.parametrize("version", _pythons())
def test_it_works_in_a_bare_environment(artifacts, tmp_path, version):
    """Each supported Python that is here: installed without torch, it imports, lists its models and finds its runtime."""
    wheel, _ = artifacts
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([_python(version) or "", "-m", "venv", tmp_path / "env"], check=True, timeout=120)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel]
    subprocess.run(install, check=True, timeout=600)

    def run(*command: str | Path) -> str:
        home = {"LOCKSTEP_HOME": str(tmp_path / "home")}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | home
        result = subprocess.run(
            command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    seen = json.loads(run(python, "-c", CHECK))
    assert seen["file"].startswith(str(tmp_path / "env"))
    assert seen["runtime"] == str(Path(seen["file"]).parent / "_runtime")
    assert seen["families"] >= 5
    assert seen["loaded"] == []
    lockstep = python.parent / "lockstep"
    assert run(lockstep, "--version").strip().endswith(__version__)
    assert "qwen3" in run(lockstep, "models")
    damaged = Path(seen["runtime"]) / "locks" / "cpu.txt"
    damaged.write_text(damaged.read_text() + "\n# changed\n")
    result = subprocess.run(
        [python, "-c", CHECK], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert "locks/cpu.txt" in result.stderr
