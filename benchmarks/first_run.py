"""From a wheel to a trained model on a machine that has nothing of ours, phase by phase; then again
without a network.

    PYTHONPATH=tests/support/server python benchmarks/first_run.py --python 3.11 --output benchmarks/results/cpu_first_run.json

Wall seconds are this machine's, whatever else it does; CPU seconds are user and system time of all
processes of the phase. Bytes are those of the folders that a phase fills.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiny import tiny_option

from bare_machine import BareMachine, Phase, build


def size(*folders: Path) -> int:
    """Bytes on the disk; what is linked several times counts once."""
    seen = {}
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                about = file.stat()
                seen[about.st_ino] = about.st_blocks * 512
    return sum(seen.values())


class Table:
    """The rows, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, where: str, what: str, phase: Phase, size: int) -> None:
        row = {"where": where, "phase": what, "wall_s": phase.wall, "cpu_s": phase.cpu, "bytes": size}
        self.rows.append(row)
        print(f"{where:8} {what:32} {phase.wall:7.0f} s {phase.cpu:7.0f} CPU s {size / 1e6:8.0f} MB", flush=True)


def run_on(machine: BareMachine, where: str, install: list[str], runtime: list[str], table: Table) -> None:
    home = machine.home / ".cache" / "lockstep"
    table.add(where, "pip install lockstep-rl[train]", machine.pip("install", *install), size(machine.folder / "env"))
    table.add(where, "lockstep runtime install", machine.lockstep("runtime", "install", *runtime), size(home))
    before = size(home)
    phase = machine.lockstep("quickstart")
    table.add(where, "lockstep quickstart", phase, size(machine.work, home) - before)
    print("\n".join(phase.output.splitlines()[-3:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--output", type=Path)
    tiny_option(parser, extra="")
    parser.set_defaults(extra="[train]")
    options = parser.parse_args()
    folder, table = Path(tempfile.mkdtemp(prefix="first-run-", dir="/tmp")), Table()
    machines: list[BareMachine] = []

    def machine(name: str, offline: bool = False) -> BareMachine:
        machines.append(BareMachine(folder / name, options.python, offline))
        return machines[-1]

    try:
        wheel, _ = build(folder / "dist")
        house = folder / "wheels"
        if not options.extra:
            bare = machine("online")
            table.add("online", "pip install lockstep-rl", bare.pip("install", wheel), size(bare.folder / "env"))
            print(bare.lockstep("--version").output)
            return
        run_on(machine("online"), "online", ["--no-cache-dir", f"{wheel}[train]"], [], table)
        shutil.rmtree(machines[0].home / ".cache")
        fetch, before = machines[0].pip("download", "--no-cache-dir", "--dest", house, f"{wheel}[train]"), size(house)
        table.add("online", "pip download lockstep-rl[train]", fetch, before)
        fetch = machines[0].lockstep("runtime", "download", house)
        table.add("online", "lockstep runtime download", fetch, size(house) - before)
        shutil.rmtree(machines[0].folder)
        wheels = ["--no-index", "--find-links", str(house), f"{house / wheel.name}[train]"]
        run_on(machine("offline", True), "offline", wheels, ["--wheels", str(house)], table)
    finally:
        for used in machines:
            used.close()
        shutil.rmtree(folder, ignore_errors=True)
    if options.output:
        options.output.write_text(json.dumps({"machine": platform.platform(), "rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
