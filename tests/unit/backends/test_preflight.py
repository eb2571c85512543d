"""What could not run is refused in one line, within 5 s and before any process starts; what is resolved says why."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false

from __future__ import annotations

import json
import random
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lockstep as ls
from lockstep.backends.megatron.plan import capacity, placement, preflight, resolve
from lockstep.backends.megatron.plan.capacity import GIB, Footprint
from lockstep.batching.pack import AUTO_ROW_LENGTH, MOST_ROW_LENGTH
from lockstep.config.megatron import Parallel
from lockstep.errors import ConfigError, UnsupportedModelError
from lockstep.models.config import parse_config
from lockstep.models.registry import get_model_support_spec, load_model_config
from lockstep.models.tiny.write import write_tiny
from lockstep.process.free_memory import DeviceMemory
from nothing_started import refused_at_once


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_tiny("qwen3", tmp_path_factory.mktemp("models") / "qwen", seed=random.randrange(1000))


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """A machine with GPUs of so many GiB, all free unless `free` says otherwise."""

    def made(count: int, total: float = 80, free: float | None = None):
        for number in range(count):
            (tmp_path / f"nvidia{number}").touch()
        monkeypatch.setattr(placement, "Path", lambda name: tmp_path if name == "/dev" else None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        memory = DeviceMemory(int((total if free is None else free) * GIB), int(total * GIB))
        monkeypatch.setattr(preflight, "gpu_memory", lambda name: memory)

    return made


def changed(base: Path, folder: Path, **fields) -> Path:
    """A copy of the checkpoint with fields of its config.json replaced."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def model_of(base: Path, **settings) -> ls.TrainableModel:
    return ls.TrainableModel(name="m", project="p", base_model=str(base), **settings)


def value(resolved: resolve.Plan, name: str):
    return resolved.stored()[name]


def why(resolved: resolve.Plan, name: str) -> str:
    return next(setting.why for setting in resolved.settings if setting.name == name)


@pytest.mark.parametrize(
    ("settings", "lora", "says"),
    [
        ({"parallel": Parallel(tensor=3)}, {}, "tensor=3 does not divide num_attention_heads=4"),
        ({"parallel": Parallel(pipeline=5)}, {}, "pipeline=5 exceeds num_hidden_layers=4"),
        ({"parallel": Parallel(expert=2, data=2)}, {}, "qwen3 has no experts"),
        ({"parallel": Parallel(context=3)}, {}, "= 3 does not divide num_attention_heads = 4"),
        ({}, {"target_modules": ("q_proj", "w_proj")}, "'w_proj' is no LoRA target .* choose from .*q_proj"),
        ({"max_model_len": 5000}, {}, "max_model_len = 5000 is more than the 4096 positions"),
        ({"server_args": ("--max-model-len=5000",)}, {}, "max_model_len = 5000 is more than the 4096"),
        ({"offload": True}, {}, "don't share GPUs"),
        ({"keep_best": "greedy_rewrd"}, {}, "keep_best = 'greedy_rewrd' is no metric: did you mean greedy_reward"),
        ({"weight_transport": "nccl"}, {}, "here it is 'gloo' or 'disk'"),
    ],
)
async def test_settings_that_do_not_fit_the_model(gpus, qwen, tmp_path, settings, lora, says):
    gpus(0)
    with refused_at_once(says):
        await model_of(qwen, lora=ls.LoraConfig(**lora)).register(ls.MegatronBackend(path=tmp_path, **settings))
    assert not (tmp_path / "p").exists()


async def test_a_model_without_a_chat_template(qwen, tmp_path):
    folder = changed(qwen, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    with refused_at_once("no chat template.*--chat-template", UnsupportedModelError):
        await model_of(folder).register(ls.MegatronBackend(path=tmp_path))
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    args = ("--chat-template", str(tmp_path / "own.jinja"))
    await ls.MegatronBackend(path=tmp_path, server_args=args).resolve(model_of(folder))


async def test_a_tokenizer_larger_than_the_embedding(qwen, tmp_path):
    size = len(json.loads((qwen / "tokenizer.json").read_text())["model"]["vocab"])
    folder = changed(qwen, tmp_path / "small", vocab_size=size - 1)
    with refused_at_once(f"has id {size - 1}, vocab_size is {size - 1}", UnsupportedModelError):
        await model_of(folder).register(ls.MegatronBackend(path=tmp_path))
    await ls.MegatronBackend(path=tmp_path).resolve(model_of(changed(qwen, tmp_path / "same", vocab_size=size)))


async def test_too_little_disk_for_the_steps_that_are_kept(qwen, tmp_path, monkeypatch):
    model, backend = model_of(qwen), ls.MegatronBackend(path=tmp_path)
    config = load_model_config(str(qwen))
    sizes = {"q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 64), "o_proj": (128, 128)}
    sizes |= {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
    elements = config.layers * 16 * sum(map(sum, sizes.values()))
    needed = (
        6 * 4 * elements + 2 * 12 * elements
    )  # adapters in fp32: 0, the best, three, the next; two optimizer states
    monkeypatch.setattr(preflight, "disk_free", lambda path: needed)
    await backend.resolve(model)
    monkeypatch.setattr(preflight, "disk_free", lambda path: needed - 1)
    with refused_at_once("the checkpoints that a run keeps take"):
        await model.register(backend)
    steps = tmp_path / "p" / "m" / "steps"
    steps.mkdir(parents=True)
    (steps / "adapter").write_bytes(b"x")  # what is there already needs no room
    await backend.resolve(model)


async def test_fp32_adapters_on_a_gpu_become_bf16_or_are_refused(gpus, qwen, tmp_path):
    """A checkpoint's fp32 is a default and gives way; the user's own is refused; merged weights and a CPU keep it."""
    gpus(1)
    resolved = await ls.MegatronBackend(path=tmp_path).resolve(model_of(qwen))
    assert resolved.resolved.dtype == value(resolved, "dtype") == "bfloat16"
    assert "LoRA kernels" in why(resolved, "dtype")
    assert any("bfloat16" in note for note in resolved.notes)
    with refused_at_once("dtype = 'float32' can't serve adapters on a GPU"):
        await model_of(qwen).register(ls.MegatronBackend(path=tmp_path, dtype="float32"))
    merged = ls.MegatronBackend(path=tmp_path, rollout_weights_mode="merged")
    assert (await merged.resolve(model_of(qwen))).resolved.dtype == "float32"
    cpu = ls.MegatronBackend(path=tmp_path, placement=ls.Placement(trainer="cpu", inference="cpu"))
    assert (await cpu.resolve(model_of(qwen))).resolved.dtype == "float32"


@pytest.mark.parametrize(
    ("count", "free", "says"),
    [
        (2, 60, "GPU 1 has 60.0 of 80.0 GiB free, the server takes 90%"),
        (1, 0.0001, "GPU 0 has 0.0 of 80.0 GiB free, the trainer needs"),
    ],
)
async def test_a_gpu_that_others_use(gpus, qwen, tmp_path, count, free, says):
    gpus(count, free=free)
    with refused_at_once(says):
        await model_of(qwen).register(ls.MegatronBackend(path=tmp_path))
    if count == 2:
        args = ("--gpu-memory-utilization", "0.7")
        await ls.MegatronBackend(path=tmp_path, server_args=args).resolve(model_of(qwen))


@pytest.mark.parametrize("count", [0, 1, 2])
async def test_the_quickstart_fits_every_machine(gpus, qwen, tmp_path, count):
    """Without a GPU, with one and with two: nothing has to be set for the tiny fp32 model."""
    gpus(count, total=24)
    resolved = await ls.MegatronBackend(path=tmp_path).resolve(model_of(qwen))
    parts = resolved.resolved
    assert parts.dtype == ("bfloat16" if count else "float32")
    assert parts.devices.colocated == (count == 1)
    assert parts.transport == ("gloo", "ipc", "nccl")[count]
    assert parts.max_model_len == 4096
    assert parts.max_num_seqs == (256 if count else 64)
    assert (parts.kv_cache_bytes is None) == (count > 0)


def sizes_of(spec_name: str, **fields):
    spec = get_model_support_spec(spec_name)
    raw = {"architectures": [spec.architectures[0]], "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    return parse_config(raw | fields, spec)


QWEN3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
}


def test_length_and_slots_follow_model_and_memory():
    config = sizes_of("Qwen/Qwen3-8B", **QWEN3_8B)
    token = capacity.bytes_per_token(config, "bfloat16", 1)
    assert token == 2 * 36 * 8 * 128 * 2
    weights = 2 * 8_190_735_360
    large = capacity.on_gpu(config, "bfloat16", int(0.9 * 80 * GIB), True, 1, weights, None, None)
    assert (large.max_model_len, large.limit) == (40960, "the model's positions")
    assert 256 < large.slots <= 1024
    assert large.slots == large.cache_tokens // 512 or abs(large.slots - large.cache_tokens // 512) <= 1
    small = capacity.on_gpu(config, "bfloat16", int(0.9 * 24 * GIB), False, 1, weights, None, None)
    assert small.max_model_len < 40960
    assert small.max_model_len * token < 0.9 * 24 * GIB - weights
    assert small.limit == "what the KV cache holds"
    assert small.slots < large.slots
    halves = capacity.on_gpu(config, "bfloat16", int(0.9 * 24 * GIB), False, 2, weights // 2, None, None)
    assert halves.max_model_len > small.max_model_len
    cpu = capacity.on_cpu(config, "bfloat16", 16 * GIB, None, None)
    assert cpu.cache == 2 * GIB
    assert 4 <= cpu.slots <= 64
    assert cpu.max_model_len * token <= cpu.cache


def test_c1_rows_grow_as_far_as_the_trainers_memory_carries():
    """Qwen3-8B in bf16: a layer's activations and the layers' inputs are some 0.6 MB per token."""
    config, single = sizes_of("Qwen/Qwen3-8B", **QWEN3_8B), Parallel()
    limits = [capacity.row_limit(config, 2, single, free * GIB) for free in (4, 10, 60)]
    assert limits[0] == AUTO_ROW_LENGTH
    assert AUTO_ROW_LENGTH < limits[1] < limits[2] == MOST_ROW_LENGTH == capacity.row_limit(config, 2, single, None)
    assert 0.4e6 < 7 * GIB / limits[1] < 0.8e6
    assert capacity.row_limit(config, 2, Parallel(context=2), 10 * GIB) >= 2 * limits[1] - 256


def test_a_small_model_takes_a_small_cache(qwen):
    config = load_model_config(str(qwen))
    chosen = capacity.on_cpu(config, "float32", 64 * GIB, None, None)
    assert (chosen.max_model_len, chosen.slots) == (4096, 64)
    token = capacity.bytes_per_token(config, "float32", 1)
    assert 4096 * token <= chosen.cache <= 64 * 4608 * token


async def test_more_context_than_a_gpu_holds_is_refused(gpus, tmp_path, qwen):
    folder = changed(qwen, tmp_path / "long", max_position_embeddings=2**24)
    gpus(2, total=4)
    resolved = await ls.MegatronBackend(path=tmp_path).resolve(model_of(folder))
    assert why(resolved, "max_model_len") == "what the KV cache holds"
    assert 4096 < resolved.resolved.max_model_len < 2**24
    with refused_at_once("needs more memory than there is"):
        await model_of(folder).register(ls.MegatronBackend(path=tmp_path, max_model_len=2**24))


async def test_config_fields_that_nobody_reads_are_reported(qwen, tmp_path, caplog):
    resolved = await ls.MegatronBackend(path=tmp_path).resolve(
        model_of(changed(qwen, tmp_path / "odd", logit_scale=0.5))
    )
    assert any("logit_scale" in note for note in resolved.notes)
    assert not (await ls.MegatronBackend(path=tmp_path).resolve(model_of(qwen))).notes


def test_what_a_footprint_counts(qwen):
    """Against the checkpoint's own tensors, and PEFT's count of an adapter's parameters."""
    from peft import LoraConfig, get_peft_model
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    from lockstep.models.contract import Layout
    from lockstep.models.registry import get_model_support_handler_for_spec

    spec, config = get_model_support_spec(str(qwen)), load_model_config(str(qwen))
    rank, targets = random.choice((8, 16)), random.choice((("q_proj", "v_proj"), spec.default_target_modules))
    shards = get_model_support_handler_for_spec(spec).all_shards(config, Layout())
    footprint = Footprint.of(shards, targets, rank)
    tensors = load_file(qwen / "model.safetensors")
    assert footprint.parameters == sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(qwen), LoraConfig(r=rank, target_modules=list(targets))
    )
    assert footprint.adapter == sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)


def test_all_linear_is_every_layer_of_the_family():
    assert ls.LoraConfig(target_modules="all-linear").target_modules is None
    with pytest.raises(ConfigError, match=r"target_modules = 'q_proj': .*list"):
        ls.LoraConfig(target_modules="q_proj")


@pytest.mark.parametrize("kept", [True, False])
async def test_a3_chat_serves_with_what_the_run_was_started_with(qwen, tmp_path, monkeypatch, kept):
    """The parser, the context and vLLM's arguments of the run; those of a run that stored none follow from the model."""
    from lockstep.backends.megatron import launch as start
    from lockstep.runs.store import RunStore

    backend = ls.MegatronBackend(
        path=tmp_path, max_model_len=777, tool_call_parser="pythonic", server_args=("--max-num-seqs", "3")
    )
    resolved = await backend.resolve(model_of(qwen))
    store = RunStore(tmp_path, "p", "m")
    store.claim({"backend": "megatron", "base_model": str(qwen), "lora": {"rank": 8, "alpha": 8}, "dtype": "float32"})
    if kept:
        store.keep_settings(resolved.stored())
    store.publish(0, store.stage(0), {})
    store.close()
    asked = []

    class Served:
        async def load_adapter(self, name, path):
            asked.append(name)

    async def launch(config, runtime, folder, progress, log_name):
        asked.append(config)
        return Served()

    monkeypatch.setattr(start, "launch", launch)
    monkeypatch.setattr(start, "find_runtime", lambda kind: kind)
    monkeypatch.setattr(placement, "Path", lambda name: tmp_path / "no-devices")
    await start.serve_step(store.path, None, print)
    config, name = asked
    assert name == "m@0"
    served = (config.max_model_len, config.max_num_seqs, config.tool_call_parser, config.extra_args)
    assert served == ((777, 3, "pythonic", ("--max-num-seqs", "3")) if kept else (2048, 64, "hermes", ()))


async def test_a3_validate_takes_a_run_as_chat_does(qwen, tmp_path, monkeypatch):
    """The last step's adapter, and the parser, arguments and dtype that the run was started with."""
    from lockstep.runs.store import RunStore
    from lockstep.validate.request import Request
    from lockstep.validate.source import find_source
    from lockstep.validate.stages.server.train_inf_mismatch import _job, _server_config

    backend = ls.MegatronBackend(path=tmp_path, tool_call_parser="pythonic", server_args=("--max-num-seqs", "3"))
    plan = await backend.resolve(model_of(qwen))
    store = RunStore(tmp_path, "p", "m")
    store.claim({"backend": "megatron", "base_model": str(qwen), "lora": {"rank": 32, "alpha": 8}, "dtype": "float32"})
    store.keep_settings(plan.stored())
    for number in range(2):
        store.publish(number, store.stage(number), {})
    store.close()
    monkeypatch.setattr(placement, "Path", lambda name: tmp_path / "no-devices")
    source = find_source(str(store.path), "all", "cpu", 0, tmp_path / "scratch", print)
    assert (source.kind, source.folder, source.run) == ("run", qwen, store.path)
    request = Request(source.folder, tmp_path / "stage", source.family, seed=5, run=source.run)
    with ExitStack() as kept:
        job = _job(request, kept)
    assert (job.base, job.dtype) == (qwen, "float32")
    assert job.adapter == store.path / "steps" / "0001" / "adapter"
    served = _server_config(False, job)
    assert (served.tool_call_parser, served.extra_args, served.seed) == ("pythonic", ("--max-num-seqs", "3"), 5)
    assert served.lora.max_rank == 32
    with pytest.raises(ConfigError, match="--dtype bfloat16: the run trains in float32; leave it out"):
        _job(replace(request, dtype="bfloat16"), ExitStack())


@pytest.mark.parametrize(
    "args",
    [
        ("--logprobs-mode", "raw_logprobs"),
        ('--override-generation-config={"top_p": 0.8}',),
        ("--enforce-eager", "--generation_config", "auto"),
        ("--host", "0.0.0.0"),
        ("--speculative-config", "{}"),
    ],
)
def test_server_args_that_would_change_what_is_trained_on_are_refused(tmp_path, args):
    """The audit's case: choices went on saying how they were sampled, and only max_mismatch noticed by luck."""
    with pytest.raises(ConfigError, match=r"server_args can't have --(logprobs|override|generation|host|spec)"):
        ls.MegatronBackend(path=tmp_path, server_args=args)
    ls.MegatronBackend(path=tmp_path, server_args=("--enforce-eager", "--max-num-seqs=8"))


async def test_an_adapter_to_start_from_is_checked_first(qwen, tmp_path):
    """A folder that is none, and an adapter of another rank or scale, each by name with the remedy."""
    backend = ls.MegatronBackend(tmp_path / "runs")
    folder = tmp_path / "adapter"

    async def refused(says: str, **lora) -> None:
        model = model_of(qwen, lora=ls.LoraConfig(start_from=folder, **lora))
        with pytest.raises(ConfigError, match=says):
            await backend.resolve(model)

    await refused("adapter_config.json can't be read")
    folder.mkdir()
    written = {"r": 8, "lora_alpha": 16, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    await refused(
        "has rank 8 and scale 5.65685, the run rank 16 and scale 2: set rank = 8 and alpha = 16 with rslora = true"
    )
    plan = await backend.resolve(model_of(qwen, lora=ls.LoraConfig(start_from=folder, rank=8, alpha=16, rslora=True)))
    assert {setting.name: setting.text for setting in plan.settings}["lora.start_from"] == str(folder)
