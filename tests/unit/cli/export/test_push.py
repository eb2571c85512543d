"""`lockstep export --push`: the files reach the Hub, and without one nothing is exported. The Hub is a small program of the test."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from lockstep.cli.export.push import check_hub
from lockstep.cli.main import app
from lockstep.errors import ConfigError

PROGRAM = """
import sys
from pathlib import Path
from lockstep.cli.export.push import check_hub, push
check_hub(sys.argv[2])
print(push(Path(sys.argv[1]), sys.argv[2]))
"""


class Hub(ThreadingHTTPServer):
    """Takes every file in its commit, as the Hub takes small ones."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.private: list[bool] = []


def _is_private(asked: dict) -> bool:
    """Older clients send a flag, newer ones a word."""
    return bool(asked.get("private")) or asked.get("visibility") == "private"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Bearer hf_good"
        self._json({"name": "me", "type": "user"} if known else {"error": "Invalid token"}, 200 if known else 401)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.server.private.append(_is_private(json.loads(body)))
            self._json({"url": f"{self.server.address}/me/model", "id": "me/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitUrl": f"{self.server.address}/me/model/commit/1", "commitOid": "1", "success": True})
        else:
            self._json({}, 404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _push(folder, token: str, address: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the Hub's package reads its address when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder), "me/model"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_files_reach_a_private_repository(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    done = _push(tmp_path, "hf_good", hub.address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/model")
    assert hub.files == {"config.json": b"{}", "model.safetensors": b"weights"}
    assert hub.private == [True]


def test_a_refused_token_says_how_to_log_in(hub, tmp_path):
    done = _push(tmp_path, "hf_bad", hub.address)
    assert "the Hub refused the token" in done.stderr
    assert "hf auth login" in done.stderr
    assert not hub.private


def test_without_a_hub_nothing_is_exported(hub, tmp_path):
    hub.server_close()
    done = _push(tmp_path, "hf_good", hub.address)
    assert "the Hub can't be reached" in done.stderr
    assert "hf upload me/model FOLDER" in done.stderr


def test_a_name_that_is_none_is_refused_before_anything(tmp_path):
    with pytest.raises(ConfigError, match="give USER/NAME"):
        check_hub("not a name")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "no-run"), "--push", "not a name"])
    assert isinstance(result.exception, ConfigError)
