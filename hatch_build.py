"""Writes the manifest of the server runtime's project that the wheel carries: a digest of every file, so that an
installation that lost or changed one is noticed before anything is built from it. Carries the evidence of
`lockstep validate` too, where there is any."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ManifestHook(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version`: the kind of build; an editable one reads `runtime/` itself."""
        if version == "editable":
            return
        runtime = Path(self.root) / "runtime"
        files = sorted(path for path in runtime.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        digests = {
            path.relative_to(runtime).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }
        self.folder = tempfile.TemporaryDirectory()
        manifest = Path(self.folder.name) / "manifest.json"
        manifest.write_text(json.dumps(digests, indent=1) + "\n")
        build_data["force_include"][str(manifest)] = "lockstep/_runtime/manifest.json"
        evidence = Path(self.root) / "evidence"
        if evidence.is_dir():
            build_data["force_include"][str(evidence)] = "lockstep/_evidence"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self.folder.cleanup()
