"""The built wheel in a bare environment: what it holds, what it asks for, and that it works without the source tree."""

from __future__ import annotations

import email
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bare_machine import ROOT, BareMachine, build, can_cut_off_the_network
from lockstep import __version__

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


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(artifacts, tmp_path):
    again = build(tmp_path)
    assert [path.read_bytes() for path in artifacts] == [path.read_bytes() for path in again]


@pytest.mark.slow
def test_it_carries_the_servers_project_and_asks_for_no_server(artifacts):
    wheel, _ = artifacts
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
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


@pytest.mark.slow
def test_the_image_is_built_from_all_that_the_wheel_needs(artifacts, tmp_path):
    """What the Dockerfile copies, and nothing else, makes the same wheel."""
    stage = (ROOT / "Dockerfile").read_text().partition("RUN uv build")[0]
    for source in re.findall(r"(?<=COPY )(.*) \S+$", stage, re.MULTILINE):
        for name in source.split():
            target = tmp_path / "source" / name
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(ROOT / name, target)
    wheel = build(tmp_path / "dist", tmp_path / "source")[0]
    assert wheel.read_bytes() == artifacts[0].read_bytes()


def _pythons() -> list[str]:
    return [version for version in ("3.11", "3.12", "3.13") if _python(version)]


def _python(version: str) -> str | None:
    homes = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python"))
    return str(homes[-1]) if homes else shutil.which(f"python{version}")


@pytest.fixture
def machines() -> Iterator[Callable[..., BareMachine]]:
    made: list[BareMachine] = []

    def start(*arguments, **options) -> BareMachine:
        made.append(BareMachine(*arguments, **options))
        return made[-1]

    yield start
    for machine in made:
        machine.close()


@pytest.mark.slow
@pytest.mark.parametrize("version", _pythons())
def test_it_works_in_a_bare_environment(artifacts, tmp_path, version, machines):
    """Each supported Python that is here: installed without torch, it imports, lists its models and finds its runtime."""
    wheel, _ = artifacts
    machine = machines(tmp_path, _python(version))
    machine.pip("install", "--quiet", wheel)
    python = machine.bin / "python"
    seen = json.loads(machine.run(python, "-c", CHECK).output)
    assert seen["file"].startswith(str(tmp_path / "env"))
    assert seen["runtime"] == str(Path(seen["file"]).parent / "_runtime")
    assert seen["families"] >= 5
    assert seen["loaded"] == []
    assert machine.lockstep("--version").output.strip().endswith(__version__)
    assert "qwen3" in machine.lockstep("models").output
    damaged = Path(seen["runtime"]) / "locks" / "cpu.txt"
    damaged.write_text(damaged.read_text() + "\n# changed\n")
    with pytest.raises(AssertionError, match=r"locks/cpu\.txt"):
        machine.run(python, "-c", CHECK)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not can_cut_off_the_network(), reason="needs unshare --net")
def test_a_machine_without_a_network_trains_from_wheels(artifacts, tmp_path, machines):
    """One machine fills a folder with wheels; another one, cut off, installs trainer and server from it and trains.

    Both have nothing of the source tree, and homes of their own.
    """
    wheel, _ = artifacts
    base, house = _python(f"{sys.version_info[0]}.{sys.version_info[1]}"), tmp_path / "wheels"
    connected = machines(tmp_path / "connected", base)
    connected.pip("install", "--quiet", wheel)
    connected.pip("download", "--quiet", "--dest", house, f"{wheel}[train]")
    connected.lockstep("runtime", "download", house)

    cut_off = machines(tmp_path / "cut_off", base, offline=True)
    with pytest.raises(AssertionError, match="pip"):
        cut_off.pip("download", "--retries", "0", "--dest", tmp_path / "nothing", "six")
    cut_off.pip("install", "--quiet", "--no-index", "--find-links", house, f"{house / wheel.name}[train]")
    cut_off.lockstep("runtime", "install", "--wheels", house)
    assert "reached 0.9" in cut_off.lockstep("quickstart").output
    (run,) = (cut_off.work / "runs" / "quickstart" / "examples").iterdir()
    assert str(ROOT) not in (run / "logs" / "trainer.log").read_text()
    cut_off.lockstep("report", run)
    assert (run / "report.html").is_file()
