"""A real vLLM server: its token, its choice fields, its adapters, its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_processes import LOOPBACK, below, listening, shared_memory
from lockstep.errors import ServerError
from lockstep.inference.launch import ServerConfig, _first_token, launch, reserved_port
from lockstep_wire import http_paths

# Shapes: S tokens of a sequence, V vocabulary.
pytestmark = pytest.mark.server

SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@pytest.fixture
async def client(server):
    http_client = httpx.AsyncClient(trust_env=False)
    async with AsyncOpenAI(base_url=server.base_url, api_key=server.api_key, http_client=http_client) as client:
        yield client


def hf_logprobs(model, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each token after the first."""
    with torch.no_grad():
        logits_SV = model(torch.tensor([tokens])).logits[0].float() / temperature
    return torch.log_softmax(logits_SV[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def write_adapter(model_folder: Path, folder: Path, seed: int) -> Path:
    """A PEFT adapter with both factors random, so that it changes every logit."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def endpoints_of(server) -> list[tuple[str, str]]:
    """Every endpoint that vLLM says it has, as (method, path)."""
    log = server.child.log_path.read_text()
    endpoints = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", log)
    return [(method, path) for path, methods in endpoints for method in methods.split(", ")]


async def test_every_route_wants_the_token(server):
    endpoints = endpoints_of(server)
    assert len(endpoints) > 30
    assert {("GET", "/health"), ("GET", "/metrics"), ("GET", "/docs"), ("POST", "/v1/load_lora_adapter")} <= set(
        endpoints
    )
    assert ("GET", "/lockstep/status") in endpoints
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": server.api_key}, {"X-Api-Key": server.api_key}]
    async with httpx.AsyncClient(base_url=server.root_url, trust_env=False, timeout=30) as client:
        for method, path in [*endpoints, ("OPTIONS", "/v1/models"), ("GET", "/not/there")]:
            for headers in wrong:
                response = await client.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                assert response.status_code == 401, (method, path, headers)
                assert method == "HEAD" or "bearer token" in response.text
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        upgrade["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
        response = await client.get("/v1/realtime", headers=upgrade)
        assert response.status_code == 403
        allowed = {"Authorization": f"Bearer {server.api_key}"}
        for path in ("/health", "/metrics", "/v1/models", "/lockstep/status"):
            assert (await client.get(path, headers=allowed)).status_code == 200


async def test_the_token_is_in_no_log_and_no_command_line(server):
    assert server.api_key not in server.child.log_path.read_text()
    assert server.child.log_path.stat().st_mode & 0o777 == 0o600
    assert server.child.log_path.parent.stat().st_mode & 0o777 == 0o700
    tree = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "vllm.entrypoints" in tree  # -ww: COLUMNS would cut the lines
    assert server.api_key not in tree


async def test_a_plain_chat_call_brings_ids_logprobs_version_and_sampling(server, client, tiny_qwen3):
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    messages = [{"role": "user", "content": "Say yes, no or maybe."}]
    reply = await client.chat.completions.create(model="base", messages=messages, n=2, max_tokens=9, seed=5)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    assert len(reply.choices) == 2
    for choice in reply.choices:
        fields = choice.model_extra
        assert fields["prompt_token_ids"] == expected
        ids = fields["token_ids"]
        assert fields["weight_versions"] == [{"version": "base", "start": 0, "end": len(ids)}]
        assert fields["sampling"] == SAMPLING
        # vLLM leaves an unfinished UTF-8 sequence at the end out of the text.
        assert tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd") == choice.message.content.rstrip(
            "\ufffd"
        )
        assert choice.logprobs is None
        reference = hf_logprobs(model, expected + ids)[-len(ids) :]
        torch.testing.assert_close(torch.tensor(fields["sampled_logprobs"]), reference, atol=1e-5, rtol=0)
    asked = await client.chat.completions.create(
        model="base", messages=messages, n=2, max_tokens=9, seed=5, logprobs=True
    )
    for choice, other in zip(reply.choices, asked.choices, strict=True):
        assert "sampled_logprobs" not in other.model_extra
        assert other.model_extra["token_ids"] == choice.model_extra["token_ids"]
        assert [entry.logprob for entry in other.logprobs.content] == choice.model_extra["sampled_logprobs"]
        assert [entry.token for entry in other.logprobs.content if entry.token]  # with their text, as OpenAI sends them


async def test_listed_logprobs_end_where_a_stop_string_cuts_the_reply(server, client):
    """vLLM drops the tokens after a stop string; the list of log-probabilities must lose the same."""
    prompt = [70, 71, 72, 73]
    settings = {"model": "base", "prompt": prompt, "max_tokens": 40, "seed": 3, "extra_body": {"ignore_eos": True}}
    uncut = (await client.completions.create(**settings)).choices[0]
    stop = next(text for text in uncut.text[3:] if text.isascii() and text.isalnum())
    cut = (await client.completions.create(**settings, stop=[stop])).choices[0]
    count = len(cut.model_extra["token_ids"])
    assert cut.finish_reason == "stop"
    assert 0 < count < 40
    assert cut.model_extra["sampled_logprobs"] == uncut.model_extra["sampled_logprobs"][:count]


async def test_what_the_client_says_is_kept_and_reported(server, client, tiny_qwen3):
    """Logprobs are those of the distribution that was sampled from, so temperature divides the logits."""
    prompt = [70, 71, 72, 73]
    reply = await client.completions.create(
        model="base",
        prompt=[prompt, prompt[:2]],
        n=2,
        max_tokens=6,
        temperature=0.5,
        top_p=0.9,
        extra_body={"top_k": 7, "min_p": 0.01},
    )
    changed = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.01}
    assert [choice.model_extra["prompt_token_ids"] for choice in reply.choices] == [prompt] * 2 + [prompt[:2]] * 2
    for choice in reply.choices:
        assert choice.model_extra["sampling"] == SAMPLING | changed
        assert len(choice.model_extra["sampled_logprobs"]) == len(choice.model_extra["token_ids"]) == 6
    reply = await client.completions.create(model="base", prompt=prompt, max_tokens=6, temperature=0.5, seed=1)
    choice = reply.choices[0]
    ids = choice.model_extra["token_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    reference = hf_logprobs(model, prompt + ids, temperature=0.5)[-len(ids) :]
    torch.testing.assert_close(torch.tensor(choice.sampled_logprobs), reference, atol=1e-5, rtol=0)
    plain = await client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=2,
        logprobs=False,
        extra_body={"return_token_ids": False},
    )
    assert plain.choices[0].logprobs is None
    assert "weight_versions" not in plain.choices[0].model_extra


async def test_a_stream_and_errors_pass_through(server, client):
    stream = await client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "x"}], max_tokens=4, stream=True
    )
    chunks = [chunk async for chunk in stream]
    ids = [token for chunk in chunks for choice in chunk.choices for token in choice.model_extra.get("token_ids") or []]
    assert len(ids) == 4
    headers = {"Authorization": f"Bearer {server.api_key}"}
    async with httpx.AsyncClient(base_url=server.base_url, headers=headers, trust_env=False) as plain:
        for body in (b"{not json", b"[1, 2]", b'{"model": "nobody", "prompt": "x"}', b""):
            response = await plain.post("/completions", content=body, headers={"Content-Type": "application/json"})
            assert 400 <= response.status_code < 500
            assert "message" in json.dumps(response.json()) or "detail" in response.json()
    assert await server.in_flight() == {}


async def test_adapters_by_version(server, client, tiny_qwen3, tmp_path):
    """Each version is its own model; it scores as PEFT does, and unloading one leaves the other."""
    tokens = torch.randint(3, 320, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    reference = {"base": hf_logprobs(base, tokens)}
    for version in (1, 2):
        folder = write_adapter(tiny_qwen3, tmp_path / f"{version}", seed=version)
        await server.load_adapter(f"policy@{version}", folder)
        peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_qwen3), folder)
        reference[f"policy@{version}"] = hf_logprobs(peft_model, tokens)
    assert await server.models() == ["base", "policy@1", "policy@2"]
    for name, expected_S in reference.items():
        for _ in range(2):  # the second time, the prefix cache could answer
            scored_S = torch.tensor(await server.score(name, tokens))
            torch.testing.assert_close(scored_S, expected_S, atol=1e-5, rtol=0)
    assert (reference["policy@1"] - reference["base"]).abs().mean() > 0.1
    assert (reference["policy@1"] - reference["policy@2"]).abs().mean() > 0.1
    reply = await client.completions.create(model="policy@2", prompt=tokens, max_tokens=5)
    assert reply.choices[0].model_extra["weight_versions"] == [{"version": "policy@2", "start": 0, "end": 5}]
    with pytest.raises(ServerError, match="already been loaded"):
        await server.load_adapter("policy@2", tmp_path / "1")
    await server.unload_adapter("policy@1")
    with pytest.raises(ServerError, match="policy@1"):
        await server.score("policy@1", tokens)
    torch.testing.assert_close(
        torch.tensor(await server.score("policy@2", tokens)), reference["policy@2"], atol=1e-5, rtol=0
    )
    await server.unload_adapter("policy@2")
    with pytest.raises(ServerError, match=r"policy@3|nothing"):
        await server.load_adapter("policy@3", tmp_path / "nothing")
    assert await server.models() == ["base"]


async def test_what_is_in_flight_is_counted_by_model(server, client):
    assert await server.in_flight() == {}
    calls = [client.completions.create(model="base", prompt=[70], max_tokens=400, n=2) for _ in range(2)]
    tasks = [asyncio.create_task(call) for call in calls]
    async with asyncio.timeout(60):  # two running requests show
        while await server.in_flight() != {"base": 2}:
            await asyncio.sleep(0.01)
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(60):  # one that was given up is not counted for ever
        while await server.in_flight() != {}:
            await asyncio.sleep(0.01)
    assert "Exception in ASGI" not in server.child.log_path.read_text()


async def test_a_bad_model_is_one_clear_error(runtime, tiny_qwen3, tmp_path):
    with pytest.raises(ServerError, match=r"no config\.json"):
        await launch(ServerConfig(model=tmp_path, served_name="base"), runtime, tmp_path / "run")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_qwen3.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    fields = json.loads((broken / "config.json").read_text()) | {"architectures": ["NoSuchModel"]}
    (broken / "config.json").write_text(json.dumps(fields))
    config = ServerConfig(model=broken, served_name="base", dtype="float32", max_model_len=64)
    lines: list[str] = []
    with pytest.raises(ServerError) as failure:
        await launch(config, runtime, tmp_path / "run", lines.append)
    first, *rest = str(failure.value).splitlines()
    assert re.search(r"died while starting \(status \d+\): .*Error: .*NoSuchModel", first), first
    assert str(tmp_path / "run" / "logs" / "server.log") in first
    assert 1 <= len(rest) <= 12
    assert lines


async def test_a_first_token_that_is_refused_says_why(server, tiny_qwen3):
    config = ServerConfig(model=tiny_qwen3, served_name="nobody")
    with pytest.raises(ServerError, match=r"failed at its first token: .*refused .*nobody"):
        await _first_token(server, config, 60.0)
    assert server.child.poll() is None


@pytest.mark.slow
async def test_a_server_whose_first_token_is_refused_is_ended(runtime, tiny_qwen3, tmp_path):
    config = ServerConfig(model=tiny_qwen3, served_name="base", dtype="float32", max_model_len=4)
    with pytest.raises(ServerError, match=r"failed at its first token: .*refused .*maximum context length"):
        await launch(config, runtime, tmp_path / "run")


def test_a_reserved_port_is_kept_for_one_who_reuses_it():
    with reserved_port() as reserved:
        address = reserved.getsockname()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        with socket.create_server(address):  # sets SO_REUSEADDR, as vLLM does
            socket.create_connection(address).close()


DRIVER = """
import asyncio, sys
from pathlib import Path
from lockstep.inference.environment.locate import Runtime
from lockstep.inference.launch import ServerConfig, launch

async def main():
    model, python, plugin, run = map(Path, sys.argv[1:])
    config = ServerConfig(model=model, served_name="base", dtype="float32", max_model_len=64)
    server = await launch(config, Runtime("cpu", python, plugin, None), run)
    print(server.child.pid, server.root_url, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def stack_end(pid: int) -> str:
    """Where the stack of a process begins: drawn anew by every exec, inherited by a fork."""
    (stack,) = (line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith("[stack]"))
    return stack.split()[0].split("-")[1]


def test_nothing_is_left_after_its_parent_was_killed(runtime, tiny_qwen3, tmp_path):
    arguments = [tiny_qwen3, runtime.python, runtime.plugin_path, tmp_path / "run"]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    guard, url = driver.stdout.readline().split()
    tree = below(driver.pid)
    assert int(guard) in tree
    shared = shared_memory(driver.pid)
    assert shared
    assert len(tree) >= 4  # guard, API process, engine core, worker
    assert Counter(stack_end(pid) for pid in tree).most_common(1)[0][1] == 3, "vLLM was imported more than once"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    deadline = time.monotonic() + 60.0
    while remaining := [pid for pid in tree if _runs(pid)]:
        assert time.monotonic() < deadline, remaining
        time.sleep(0.05)
    assert not any(path.exists() for path in shared)
    with pytest.raises(httpx.TransportError):
        httpx.get(url, trust_env=False)


async def test_sockets_that_would_have_too_long_a_path_are_refused(tiny_qwen3, runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 60)
    config = ServerConfig(model=tiny_qwen3, served_name="base")
    with pytest.raises(ServerError, match="set TMPDIR to a folder of at most 52 bytes"):
        await launch(config, runtime, tmp_path)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


async def test_c2_a_beam_search_does_not_end_the_server(server, client):
    """A beam's name once raised inside vLLM's output handler, which ended the server. Its choices have no versions."""
    extra = {"use_beam_search": True, "return_token_ids": True}
    reply = await client.completions.create(model="base", prompt="a", max_tokens=3, n=2, extra_body=extra)
    assert len(reply.choices) == 2
    assert all(choice.weight_versions is None for choice in reply.choices)
    after = await client.completions.create(model="base", prompt="a", max_tokens=3)
    assert after.choices[0].weight_versions
    assert server.child.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="sockets are read from /proc")
async def test_h2_the_server_listens_on_loopback_only(server):
    """Gloo takes the address of the host's name, which may be the network's, unless configured otherwise."""
    processes = below(server.child.pid)
    sockets = [address for pid in processes for address in listening(pid)]
    assert sockets
    assert set(sockets) <= LOOPBACK, sockets
    environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in processes]
    assert sum(b"\0GLOO_SOCKET_IFNAME=lo\0" in b"\0" + environ for environ in environments) >= 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(("/lockstep/served_name", {"name": name}) for name in ("", "a\nb", "a b", "x" * 100_000, 5)),
        ("/lockstep/kept_names", {"names": ["x\n"]}),
        ("/lockstep/sync/plan", {}),
        ("/lockstep/sync/plan", {"id": "x"}),
        ("/lockstep/sync/plan", {"id": "x", "senders": 5}),
        ("/lockstep/sync/plan", {"id": "x", "senders": [[{"nbytes": 8, "slots": [["a", "nothing", [1], 0, None]]}]]}),
        ("/lockstep/sync/connect", {"senders": [{}]}),
        ("/lockstep/sync/connect", {"senders": [{"transport": "gloo"}]}),
        ("/lockstep/sync/connect", {"senders": [{"transport": "disk"}]}),
        ("/v1/completions", {"model": "base", "prompt": 5}),
    ],
)
async def test_low_bad_input_to_control_endpoints_is_refused_and_changes_nothing(server, path, body):
    before = await server.version()
    async with httpx.AsyncClient(trust_env=False) as client:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        reply = await client.post(server.root_url + path, json=body, headers=headers)
    assert 400 <= reply.status_code < 500, reply.text
    assert await server.version() == before


async def test_low_tools_that_are_no_list_do_not_lose_the_reply(server):
    body = {"model": "base", "prompt": [5, 6, 7, 8], "max_tokens": 2, "tools": 5}
    reply = await server.call("POST", "/v1/completions", body)
    assert len(reply.json()["choices"][0]["token_ids"]) == 2


async def test_m5_a_silent_sender_does_not_block_the_worker(server, tmp_path):
    """It never comes, as a trainer that is stopped at that moment."""
    tmp_path.chmod(0o700)
    sender = {"transport": "gloo", "folder": str(tmp_path), "world_size": 2, "deadline_s": 2.0}
    started = time.monotonic()
    with pytest.raises(ServerError, match="could not join sender 0: the sender did not connect"):
        await server.call("POST", http_paths.SYNC_CONNECT, {"senders": [sender]})
    assert time.monotonic() - started < 30
    assert await server.score("base", [5, 6, 7])


async def test_a_store_that_others_can_enter_is_refused(server, tmp_path):
    tmp_path.chmod(0o755)
    for folder in (tmp_path, tmp_path / "none", "/etc", "/etc/passwd", "\0", ""):
        sender = {"transport": "gloo", "folder": str(folder), "world_size": 2, "deadline_s": 2.0}
        with pytest.raises(ServerError, match=r"no private folder|can't be seen here"):
            await server.call("POST", http_paths.SYNC_CONNECT, {"senders": [sender]})
    assert list(tmp_path.iterdir()) == []
