"""Starts a vLLM server and hands it over once it has generated a token through the whole path."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lockstep.config import deadlines
from lockstep.errors import ServerError
from lockstep.inference.client import Server
from lockstep.inference.environment.locate import Runtime
from lockstep.inference.log import last_words, why_it_ended
from lockstep.inference.vllm_args import model_arguments, server_facts
from lockstep.process.child import LONGEST_SOCKET, child_env, spawn, visible_gpus
from lockstep_wire import http_paths

Progress = Callable[[str], None]

_POLL_S = 0.25
_LONGEST_TMPDIR = LONGEST_SOCKET - 18 - 37
"""Bytes: vLLM's sockets lie below it, in a folder of the guard's, by the name of a UUID."""
_REPORT_S = 2.0


class LoraServing(BaseModel):
    """The number and size of adapters that a server holds. vLLM allocates room for `max_loras` of
    rank `max_rank` on the device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_rank: int = Field(default=16, ge=1)
    max_loras: int = Field(default=4, ge=1)
    """Adapters that one batch may mix."""
    max_cpu_loras: int = Field(default=16, ge=1)
    """Adapters kept in host memory."""
    targets: tuple[str, ...] = Field(min_length=1)
    """The only layers that adapters change, by their Hugging Face names; vLLM then keeps no room
    for the others.

    Without this limit vLLM 0.32 wraps the output head too. On a CPU it then dies of a request for
    prompt logprobs that is batched with another request.
    """


class ServerConfig(BaseModel):
    """Everything that decides how a server is started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    """A Hugging Face checkpoint folder."""
    served_name: str
    """Model name of the base weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lora: LoraServing | None = None
    max_model_len: int = Field(default=2048, ge=2)
    max_num_seqs: int = Field(default=64, ge=1)
    gpus: tuple[int, ...] = ()
    """Devices of a CUDA server; their number is the tensor-parallel size. Empty: one, the first
    visible.
    """
    seed: int = 0
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    """Memory of the KV cache. None: 256 MiB on a CPU, what `gpu_memory_utilization` leaves on a
    GPU.
    """
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    sleeps: bool = False
    """Colocated mode: the server can give its device memory away (vLLM then allocates it in a way
    that it can).
    """
    threads: int | None = Field(default=None, ge=1)
    """Compute threads of a CPU server. None: `OMP_NUM_THREADS` where it is set, else all of this
    machine's cores, since the trainer rests while the server samples.
    """
    tool_call_parser: str | None = None
    """vLLM's name of the parser that turns text into tool calls. None:

    requests with tools are refused, with `tools_off` where it says why.
    """
    tools_off: str | None = None
    """The answer to a request with tools where there is no parser."""
    capture_routed_experts: bool = False
    """Each choice carries the experts that its tokens used. For mixture-of-experts models.

    On a CPU vLLM can do this with Triton's interpreter only: some tens of tokens per second.
    """
    exact: bool = False
    """Weights in fp32, computed in fp64, on a CPU only: log-probabilities are right to their own
    fp32 rounding. Slow.
    """
    plain_weights: bool = False
    """On a CPU, weights stay as they are loaded, unpacked. A weight sync then copies them in place,
    as on a GPU.

    The numbers are the same; large models are slower.
    """
    extra_args: tuple[str, ...] = ()
    """Further arguments of vLLM's own command line."""
    extra_env: dict[str, str] = Field(default_factory=dict)
    """Further environment variables of the server."""
    start_deadline_s: float = Field(default=deadlines.SERVER_START_S, gt=0.0)


async def launch(
    config: ServerConfig,
    runtime: Runtime,
    run_dir: Path,
    progress: Progress = lambda line: None,
    log_name: str = "server.log",
    replica: int = 0,
) -> Server:
    """Starts the server on a free loopback port with a fresh token; returns when it has generated a
    token.

    replica: its place among the run's servers, from 0.

    Its log is `log_name` in `run_dir/logs`. Raises ServerError, with the log's last lines, if it
    dies or misses its deadline.
    """
    if not (config.model / "config.json").is_file():
        raise ServerError(f"{config.model} is no Hugging Face checkpoint folder: it has no config.json")
    if config.exact and runtime.kind != "cpu":
        raise ServerError(f"exact numerics need a CPU server, this one is for {runtime.kind}")
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
        raise ServerError(
            f"{tempfile.gettempdir()} is too long for the paths of vLLM's Unix sockets: "
            f"set TMPDIR to a folder of at most {_LONGEST_TMPDIR} bytes"
        )
    with reserved_port() as reserved:
        server = _start(config, runtime, run_dir / "logs" / log_name, reserved.getsockname()[1], replica)
        try:
            await _until_ready(server, config, progress)
        except BaseException:  # a cancelled start, too, must leave no server behind
            server.child.kill()
            raise
    return server


def _start(config: ServerConfig, runtime: Runtime, log: Path, port: int, replica: int) -> Server:
    token = secrets.token_urlsafe(32)
    child = spawn(
        _command(config, runtime, port),
        _environment(config, runtime, token),
        log,
        f"server {replica + 1}" if replica else "the server",
    )
    return Server(child, port, token, config.served_name, replica)


def _command(config: ServerConfig, runtime: Runtime, port: int) -> list[str]:
    command = [
        str(runtime.python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--model", str(config.model), "--served-model-name", config.served_name, "--dtype", config.dtype]
    command += ["--max-model-len", str(config.max_model_len), "--max-num-seqs", str(config.max_num_seqs)]
    command += ["--seed", str(config.seed), "--disable-uvicorn-access-log"]
    # Nothing hidden in the checkpoint changes the sampling, and logprobs are of the distribution
    # that was sampled from.
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    # The last one is the outermost.
    command += ["--middleware", "lockstep_vllm.http.openai_fields.ChoiceFields"]
    if runtime.kind == "cpu" and not server_facts(config.model).one_token_prompts_on_cpu:
        command += ["--middleware", "lockstep_vllm.http.short_prompts.TwoTokenPrompts"]
    if config.tools_off is not None:
        command += ["--middleware", "lockstep_vllm.http.tools_off.ToolsOff"]
    command += ["--middleware", "lockstep_vllm.http.auth.BearerAuth"]
    if config.tool_call_parser is not None:
        command += ["--enable-auto-tool-choice", "--tool-call-parser", config.tool_call_parser]
    command += ["--worker-extension-cls", "lockstep_vllm.weight_sync.worker_extension.Receiver"]
    command += model_arguments(config.model, lora=config.lora is not None)
    if config.lora is not None:
        command += ["--enable-lora", "--max-lora-rank", str(_served_rank(config.lora.max_rank))]
        command += ["--max-loras", str(config.lora.max_loras), "--max-cpu-loras", str(config.lora.max_cpu_loras)]
        command += ["--lora-target-modules", *config.lora.targets]
    if config.sleeps and runtime.kind != "cpu":
        command += ["--enable-sleep-mode"]
    if config.capture_routed_experts:
        command += ["--enable-return-routed-experts", "--enable-prefix-caching"]
    if runtime.kind == "cpu":
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(config.kv_cache_bytes or 256 << 20)]
        if not config.capture_routed_experts and not server_facts(config.model).own_block_size_on_cpu:
            # vLLM's own 128 reuses no prefix of a short prompt; its kernels want multiples of 32.
            # Hybrid models choose theirs.
            command += ["--block-size", "32"]
    else:
        command += ["--tensor-parallel-size", str(max(1, len(config.gpus)))]
        if config.kv_cache_bytes is not None:
            command += ["--kv-cache-memory-bytes", str(config.kv_cache_bytes)]
        else:
            command += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    return [*command, *config.extra_args]


def _served_rank(rank: int) -> int:
    """The smallest rank that vLLM has room sizes for and that holds `rank`."""
    sizes = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    for size in sizes:
        if rank <= size:
            return size
    raise ServerError(f"LoRA rank {rank} is larger than vLLM serves: use at most {sizes[-1]}")


def _environment(config: ServerConfig, runtime: Runtime, token: str) -> dict[str, str]:
    extra = {
        "LOCKSTEP_SERVER_TOKEN": token,
        "PYTHONPATH": str(runtime.plugin_path),
        "PYTHONUNBUFFERED": "1",
        "VLLM_PLUGINS": "lockstep",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "HF_HUB_OFFLINE": "1",  # the checkpoint is a folder: nothing is to be looked up
        # Frameworks mark tools as strict. vLLM would hold the calls to a grammar, and the tokens be
        # no sample of the policy.
        "VLLM_ENFORCE_STRICT_TOOL_CALLING": "0",
    }
    if Path("/sys/class/net/lo").exists():
        extra["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo listens where the host's name points to
    if config.tools_off is not None:
        extra["LOCKSTEP_TOOLS_OFF"] = config.tools_off
    if runtime.kind == "cpu":
        # Pinned threads of two servers, or of a server and a trainer, would share the first core.
        threads = str(config.threads or os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        extra |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads}
        # vLLM compiles a helper of its sampler even in eager mode: 15 s of C++ at the first token,
        # for nothing here.
        extra["TORCH_COMPILE_DISABLE"] = "1"
        if config.plain_weights:
            extra["LOCKSTEP_PLAIN_CPU_WEIGHTS"] = "1"
        if config.exact:
            extra["LOCKSTEP_EXACT"] = "1"
        if config.capture_routed_experts or config.exact:
            # Only vLLM's second model runner returns routed experts, and only it is taught fp64. It
            # wants Triton, which a CPU has as an interpreter only.
            interpreter = runtime.plugin_path / "lockstep_vllm" / "interpreter"
            extra["PYTHONPATH"] = os.pathsep.join([str(runtime.plugin_path), str(interpreter)])
            extra |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    elif config.gpus:
        extra["CUDA_VISIBLE_DEVICES"] = visible_gpus(config.gpus)
    return child_env(extra | config.extra_env)


def reserved_port() -> socket.socket:
    """A free loopback port, kept from every other program while the returned socket is open.

    vLLM opens its port many seconds after it is given its number, and the machine hands a free port
    to whoever asks. A bound socket that doesn't listen keeps the port: the machine gives the port
    to nobody who asks for any port. A program that names the port and sets SO_REUSEADDR, as vLLM
    does, may listen there.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


async def _until_ready(server: Server, config: ServerConfig, progress: Progress) -> None:
    started = time.monotonic()
    reported = started
    while True:
        await asyncio.sleep(_POLL_S)
        elapsed = time.monotonic() - started
        status = server.child.poll()
        if status is not None:
            raise ServerError(why_it_ended(server.child, f"died while starting (status {status})"))
        if elapsed > config.start_deadline_s:
            raise ServerError(why_it_ended(server.child, f"was not ready after {config.start_deadline_s:g} s"))
        if time.monotonic() - reported >= _REPORT_S:
            reported = time.monotonic()
            progress(f"starting vLLM, {elapsed:.0f} s: {last_words(server.child)}")
        if _listens(server):
            break
    await _first_token(server, config, max(5.0, config.start_deadline_s - elapsed))
    progress(f"vLLM is ready after {time.monotonic() - started:.1f} s")


def _listens(server: Server) -> bool:
    """True if the port accepts connections. vLLM opens the port when all its endpoints are up."""
    port = int(server.root_url.rpartition(":")[2])
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def _first_token(server: Server, config: ServerConfig, deadline_s: float) -> None:
    """Half of vLLM's failures show at the first request only, so a health check is not enough."""
    # Several tokens: vLLM's CPU convolution of Qwen3.5 dies of a prompt of one.
    body = {"model": config.served_name, "prompt": [0, 0, 0, 0], "max_tokens": 1}
    try:
        reply = (await server.call("POST", http_paths.COMPLETIONS, body, deadline_s=deadline_s)).json()
    except ServerError as error:
        refusal = f": {error}" if server.child.poll() is None else ""  # the log explains an end
        raise ServerError(why_it_ended(server.child, f"failed at its first token{refusal}")) from None
    choice = reply["choices"][0]
    if len(choice.get("token_ids") or []) != 1 or not choice.get("weight_versions") or "sampling" not in choice:
        raise ServerError(
            f"the server answers without token ids and versions: is {server.child.log_path} our plugin's?"
        )
    status = await server.status()
    if status["in_flight"]:
        raise ServerError(f"a fresh server says that it is serving {status['in_flight']}")
