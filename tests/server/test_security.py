"""A running system against others: another user's process on the same machine gets nothing of it (audit C1, H2, M10, M13), and
requests without a token change nothing. `docs/security.md` names these tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

import lockstep as ls
import other_user
from frozen_processes import LOOPBACK, below
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.models.tiny.write import write_tiny
from lockstep.process.child import lockstep_home
from replaying import group, roll_out, words

pytestmark = pytest.mark.server
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root may start another user's process"
)
NOBODY = 65534
PUBLIC = re.compile(r"/proc/\d+/(cmdline|comm|status|stat|limits)$")
"""What the kernel shows everybody."""
PROMPT = "the quiet prompt of this run"


@pytest.fixture(scope="module")
def earlier_ports() -> frozenset[int]:
    """Ports of what earlier tests left in this process, such as the process group that engine tests share."""
    return frozenset(sockets_of([os.getpid(), *below(os.getpid())])[0])


@pytest.fixture(scope="module")
async def running(earlier_ports, runtime):
    """(model, backend) after a step with an episode open; in a folder whose parents everybody may enter."""
    open_to_all = Path(tempfile.mkdtemp(prefix="lockstep-test-", dir="/tmp"))
    open_to_all.chmod(0o755)
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    base = write_tiny("qwen3", open_to_all / "base", seed=5, overrides=small)
    backend = MegatronBackend(path=open_to_all / "runs", max_model_len=512, parallel=ls.Parallel(data=2))
    model = ls.TrainableModel(name="kept", project="tests", base_model=str(base), lora=ls.LoraConfig(rank=8, alpha=16))
    await model.register(backend)
    await step(model, backend)
    yield model, backend
    await backend.close()
    shutil.rmtree(open_to_all)


async def step(model, backend):
    groups = [group(await roll_out(model, [words(20)], n=4)) for _ in range(2)]
    return await backend.train(model, groups, ls.TrainConfig(learning_rate=1e-2))


def sockets_of(pids: list[int]) -> tuple[dict[int, str], list[str]]:
    """TCP ports that listen, with their addresses, and Unix sockets, of these processes."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
            except FileNotFoundError:
                continue
    ports, paths = {}, []
    for table in ("tcp", "tcp6"):
        for row in (line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]):
            if row[3] == "0A" and row[9] in inodes:
                address, port = row[1].split(":")
                ports[int(port, 16)] = address
    for row in (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]):
        if row[6] in inodes and len(row) > 7:
            paths.append(row[7])
    return ports, sorted(set(paths))


def files_of(backend, model, pids: list[int]) -> list[str]:
    """The run's files and folders, shared memory, and whatever else its processes hold open or keep in temporary folders."""
    run = backend.run_path(model)
    paths = {run, *run.rglob("*")}
    for pid in pids:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        paths |= {Path(line.split()[5]) for line in maps if "/dev/shm/" in line}
        environment = dict(
            entry.split(b"=", 1) for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in entry
        )
        if (folder := Path(os.fsdecode(environment.get(b"TMPDIR", b"/tmp")))) != Path("/tmp"):
            paths |= {folder, *folder.rglob("*")}
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = Path(os.readlink(link))
            except FileNotFoundError:
                continue
            if target.is_file() and not target.is_relative_to("/proc"):
                paths.add(target)
    public = (sys.prefix, lockstep_home(), "/usr", "/lib", "/etc")  # programs, and no run
    return sorted(str(path) for path in paths if not any(path.is_relative_to(place) for place in public))


def as_nobody(asked: dict) -> dict:
    program = Path(other_user.__file__).read_text()
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-I", "-S", "-c", program],
        input=json.dumps(asked), capture_output=True, text=True, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/",
        env={"PATH": "/usr/local/bin:/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_root
async def test_c1_another_user_reads_no_secret_and_changes_nothing(earlier_ports, running):
    model, backend = running
    run = backend.run_info(model)
    episode = model.episode()
    await model.openai_client().completions.create(model=model.inference_name(), prompt=PROMPT, max_tokens=2)
    before = (await run.server.models(), await run.server.version(), run.store.published())
    pids = [os.getpid(), *below(os.getpid())]
    ports, sockets = sockets_of(pids)
    ports = {port: address for port, address in ports.items() if port not in earlier_ports}
    assert set(ports.values()) <= LOOPBACK  # H2: nothing listens on the network
    files = files_of(backend, model, pids[1:])
    assert len(pids) > 8
    assert len(ports) >= 2  # the server's and the gateway's
    assert len(sockets) >= 2  # the trainer's and vLLM's own
    assert len(files) > 30
    asked = {"pids": pids, "ports": sorted(ports), "paths": files, "sockets": sockets}
    seen = as_nobody(asked)
    text = json.dumps(seen)
    for secret in (run.server.api_key, episode.api_key, PROMPT):
        assert secret not in text
    not_public = {name: value for name, value in seen["read"].items() if not PUBLIC.search(name)}
    answered = {name: value for name, value in not_public.items() if name.startswith("port ")}
    assert all(refusal(answer) for answers in answered.values() for answer in answers), answered
    assert {name: value for name, value in not_public.items() if name not in answered} == {}
    assert seen["done"] == []
    episode.end()
    assert (await run.server.models(), await run.server.version(), run.store.published()) == before
    assert (await step(model, backend)).metrics["mismatch_max"] < 1e-5


def refusal(answer: str) -> bool:
    """What a stranger may hear: nothing, an HTTP refusal, or bytes of gloo's handshake, which hold no word of the run."""
    return not answer or bool(re.match(r"HTTP/1.1 4\d\d ", answer)) or len(answer) < 64


REQUESTS = int(os.environ.get("LOCKSTEP_BAD_REQUESTS", "600"))
"""Of each server; 10,000 by hand."""
METHODS = ("GET", "POST", "DELETE", "OPTIONS")
STRANGERS = ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer " + "x" * 43}, {"x-api-key": "ls-0-0"})


async def routes_of(server) -> list[tuple[str, str]]:
    """(method, path) of all that the running server answers, by its own account."""
    described = (await server.call("GET", "/openapi.json")).json()["paths"]
    routes = [(method.upper(), path) for path, methods in described.items() for method in methods]
    assert {path for _, path in routes} >= {"/v1/completions", "/health", "/lockstep/sync/commit"}
    return [
        *routes,
        ("GET", "/docs"),
        ("GET", "/redoc"),
        ("GET", "/openapi.json"),
        ("GET", "/metrics"),
        ("GET", "/none"),
    ]


def routes_of_gateway() -> list[tuple[str, str]]:
    from lockstep.gateway.app import application
    from lockstep.gateway.upstream import Upstream

    app = application(lambda key: None, Upstream())  # the routes are those of any gateway
    return [(method, route.path) for route in app.routes for method in sorted(route.methods)]


async def answers(root: str, requests) -> list[tuple[str, int]]:
    """(request, status) of each (method, path, headers, body)."""
    slots = asyncio.Semaphore(8)
    async with httpx.AsyncClient(base_url=root, timeout=120, trust_env=False) as client:

        async def request_of(method, path, headers, body):
            async with slots:
                path = re.sub(r"\{\w+(:path)?\}", "none", path)
                reply = await client.request(method, path, headers=headers, content=body)
                return f"{method} {path} {headers.keys()} {body[:60]!r}: {reply.text[:200]}", reply.status_code

        return await asyncio.gather(*(request_of(*request) for request in requests))


def repeated(requests: list, count: int) -> list:
    return [requests[number % len(requests)] for number in range(max(count, len(requests)))]


async def state(model, backend):
    run = backend.run_info(model)
    scores = await run.server.score(model.inference_name(), list(range(5, 25)))
    return (
        await run.server.models(),
        await run.server.version(),
        await run.server.in_flight(),
        scores,
        run.store.published(),
    )


async def test_requests_without_a_token_are_refused_on_every_route(running):
    model, backend = running
    server, episode = backend.run_info(model).server, model.episode()
    before = await state(model, backend)
    paths = sorted({path for _, path in await routes_of(server)})
    asked = [(method, path, key, b"{}") for path in paths for method in METHODS for key in STRANGERS]
    wrong = [said for said, status in await answers(server.root_url, repeated(asked, REQUESTS)) if status != 401]
    assert wrong == []
    asked = [(method, path, key, b"{}") for method, path in routes_of_gateway() for key in STRANGERS]
    root = episode.base_url.removesuffix("/v1")
    wrong = [said for said, status in await answers(root, repeated(asked, REQUESTS)) if status != 401]
    assert wrong == []
    episode.end()
    assert await state(model, backend) == before
