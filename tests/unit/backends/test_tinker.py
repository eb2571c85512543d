"""TinkerBackend against a stand-in for the tinker package that really samples and trains a small model (fake_tinker.py)."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from openai import APIStatusError, BadRequestError, NotFoundError

import fake_tinker
import lockstep as ls
from lockstep.backends.megatron.launch import serve_step
from lockstep.backends.tinker import chat_format
from lockstep.backends.tinker.datums import check_lora, check_train_config, examples_of, loss_inputs
from lockstep.batching.pack import pack
from lockstep.batching.packed_batch import scored_row, total_weight
from lockstep.engine.losses.policy import policy_loss, scored_tensors
from lockstep.errors import ConfigError, DataError, MismatchError, StaleRolloutError, StoreError, TrainerError
from lockstep.metrics.names import is_known
from lockstep.models.registry import get_model_support_spec
from lockstep.models.tiny.write import write_tiny
from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup
from random_batches import choice, random_sequences, seeds

BASE, KEY = "Qwen/Qwen3-8B", "tml-a-secret-key"
TRAIN = ls.TrainConfig(learning_rate=5e-3)
STEPS = 4
QUESTION = [{"role": "user", "content": "yes or no?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint small enough to train in a second."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    return write_tiny("qwen3", tmp_path_factory.mktemp("models") / "small", seed=5, overrides=sizes)


@pytest.fixture
def service(folder, monkeypatch):
    service = fake_tinker.Service(folder)
    monkeypatch.setitem(sys.modules, "tinker", service.module())
    return service


def make(name: str = "m", **changes) -> ls.TrainableModel:
    return ls.TrainableModel(**({"name": name, "project": "p", "base_model": BASE} | changes))


async def answer(model: ls.TrainableModel, messages=QUESTION, **fields):
    """The first choice of a completion."""
    fields = {"max_tokens": 2, "temperature": 1.0} | fields
    reply = await model.openai_client().chat.completions.create(
        model=model.inference_name(), messages=list(messages), **fields
    )
    return reply.choices[0]


async def two_turns(model: ls.TrainableModel, wanted: int, seed: int) -> Trajectory:
    """Two answers in one conversation; the share of their tokens with the parity `wanted` is the reward."""
    first = await answer(model, seed=seed)
    again = [*QUESTION, first.message.model_dump(exclude_none=True), {"role": "user", "content": "and now?"}]
    second = await answer(model, again, seed=seed + 1000)
    tokens = first.token_ids + second.token_ids
    items = [*QUESTION, first, again[-1], second]
    return Trajectory(messages_and_choices=items, reward=sum(token % 2 == wanted for token in tokens) / len(tokens))


async def greedy(model: ls.TrainableModel) -> list[int]:
    return (await answer(model, temperature=0.0)).token_ids


def share(service, client, wanted: int, step: int) -> float:
    """The exact probability that step `step` answers the choice's prompt with a token of parity `wanted`."""
    path = next(path for path in service.saved if path.endswith(f"sampler_weights/step-{step:04d}"))
    with torch.no_grad():
        chances_V = service.saved[path](torch.tensor([client.prompt_token_ids])).logits[0, -1].softmax(-1)
    return float(chances_V[wanted::2].sum())


async def groups_of(model: ls.TrainableModel, wanted: int, size: int = 16) -> list[TrajectoryGroup]:
    seeds = [model.step * 100 + number for number in range(size)]
    return await ls.gather_trajectory_groups([[two_turns(model, wanted, seed) for seed in seeds]], progress=False)


async def test_training_moves_the_answers_and_a_new_process_goes_on(service, tmp_path):
    backend = ls.TinkerBackend(path=tmp_path, api_key=KEY)
    model = make()
    await model.register(backend)
    assert model.step == 0
    before = await greedy(model)
    wanted = 1 - before[0] % 2
    groups = await groups_of(model, wanted)
    rewards = []
    for step in range(STEPS):
        latest = groups if step == 0 else await groups_of(model, wanted)
        result = await backend.train(model, latest, TRAIN)
        rewards.append(result.metrics["reward"])
        assert (result.step, model.step) == (step + 1, step + 1)
        assert result.metrics["mismatch_max"] < 1e-4  # the trainer's targets are the sampler's tokens
        assert {"loss", "kl", "seconds_train", "seconds_sync"} <= set(result.metrics)
    after = await greedy(model)
    assert after[0] % 2 == wanted != before[0] % 2
    assert service.losses[0] == ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 5.0})
    reply = await answer(model)
    assert share(service, reply, wanted, STEPS) > 0.7 > 0.6 > share(service, reply, wanted, 0)
    served = await model.openai_client().models.list()
    assert [reply.id for reply in served.data] == [f"m@{STEPS}", f"m@{STEPS - 1}"]
    with pytest.raises(StaleRolloutError, match=f"sampled by step 0, {STEPS} steps before"):
        await backend.train(model, groups, TRAIN)
    await backend.close()
    assert service.clients[0].closed == "success"
    again, resumed = ls.TinkerBackend(path=tmp_path, api_key=KEY), model  # its backend is closed: free for another one
    await resumed.register(again)
    assert resumed.step == STEPS
    assert await greedy(resumed) == after
    recorded = again.run_info(resumed).store.metrics()
    assert all(is_known(name) for metrics in recorded.values() for name in metrics)
    assert recorded[STEPS]["reward"] == rewards[-1]
    await again.close()


async def test_a_refused_step_leaves_nothing_behind(service, tmp_path):
    """A step that fails midway, gradients computed or not, and then a good one: the same weights as without the failures."""
    scores = {}
    for name, failures in (("clean", ()), ("rough", ("mismatch", "token", "optim_step", "sampler_weights"))):
        backend, model = ls.TinkerBackend(path=tmp_path, api_key=KEY), make(name)
        await model.register(backend)
        wrong = await groups_of(model, 0, 4)
        groups = await groups_of(model, 1, 4)
        for failure in failures:
            if failure == "mismatch":
                with pytest.raises(MismatchError, match="sampler and trainer disagree"):
                    await backend.train(model, wrong, TRAIN.model_copy(update={"max_mismatch": 1e-12}))
            elif failure == "token":
                with pytest.raises(
                    MismatchError, match=r"trajectory \d+.*, token \d+: Tinker.* max_token_mismatch = 1e-12"
                ):
                    await backend.train(model, wrong, TRAIN.model_copy(update={"max_token_mismatch": 1e-12}))
            else:
                service.refuse = {failure}
                with pytest.raises(TrainerError, match=f"no {failure} today"):
                    await backend.train(model, wrong, TRAIN)
                service.refuse = set()
            assert model.step == 0
        for _ in range(2):
            await backend.train(model, groups, TRAIN.model_copy(update={"max_steps_off_policy": 1}))
        sampled = await answer(model, seed=3, max_tokens=8)
        scores[name] = [sampled.token_ids, [entry.logprob for entry in sampled.logprobs.content]]
        await backend.close()
    assert scores["rough"][0] == scores["clean"][0]
    np.testing.assert_allclose(scores["rough"][1], scores["clean"][1], atol=1e-5)


async def test_what_the_endpoint_refuses_and_understands(service, tmp_path):
    backend, model = ls.TinkerBackend(path=tmp_path, api_key=KEY), make()
    await model.register(backend)
    for field, value in (("presence_penalty", 0.5), ("stop", ["x"]), ("response_format", {"type": "json_object"})):
        with pytest.raises(BadRequestError, match=field):
            await answer(model, **{field: value})
    with pytest.raises(BadRequestError, match="stream"):
        await model.openai_client().chat.completions.create(model="m@0", messages=QUESTION, stream=True)
    for name in ("m@1", "other@0", "m", "m@x"):
        with pytest.raises(NotFoundError, match="does not exist"):
            await model.openai_client().chat.completions.create(model=name, messages=QUESTION)
    with pytest.raises(BadRequestError, match="parts of type text"):
        await answer(model, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert (await answer(model, parts)).prompt_token_ids == (await answer(model)).prompt_token_ids
    several = await model.openai_client().chat.completions.create(
        model="m@0", messages=QUESTION, n=3, max_completion_tokens=2, extra_body={"top_k": -1}
    )
    assert [several_choice.index for several_choice in several.choices] == [0, 1, 2]
    assert several.choices[2].sampling == choice([1], [2]).sampling | {
        name: 1.0 if name == "repetition_penalty" else 0.0
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    }
    url = backend.endpoint(model).base_url
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for path in ("/chat/completions", "/models", "/nothing"):
            assert httpx.post(url + path, headers=headers, trust_env=False).status_code == 401
    service.refuse = {"sample"}
    with pytest.raises(APIStatusError, match="no sample today"):
        await model.openai_client().with_options(max_retries=0).chat.completions.create(model="m@0", messages=QUESTION)
    await backend.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


async def test_the_key_stays_secret_and_missing_things_are_named(service, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set TINKER_API_KEY"):
        await make().register(ls.TinkerBackend(path=tmp_path))
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    backend = ls.TinkerBackend(path=tmp_path)
    service.refuse = {"create"}
    with pytest.raises(TrainerError, match=f"creating an adapter of {BASE}: no create today"):
        await make().register(backend)
    service.refuse = set()
    with caplog.at_level("DEBUG"):
        await make().register(backend)
        with pytest.raises(ConfigError, match="p/m is registered already"):
            await make().register(backend)
        await make(project="another").register(backend)
    assert service.clients[0].api_key == KEY
    assert KEY not in repr(backend) + repr(backend._runs) + caplog.text
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    with pytest.raises(ConfigError, match="base_model"):
        await make("folder", base_model=str(service.folder)).register(backend)
    await backend.close()
    steps = tmp_path / "p" / "m" / "steps" / "0000"
    assert json.loads((steps / "tinker.json").read_text())["state"].startswith("tinker://")
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(ConfigError, match=r"pip install lockstep-rl\[tinker\]"):
        await make().register(ls.TinkerBackend(path=tmp_path))


async def test_a_run_belongs_to_one_backend(service, tmp_path):
    other = ls.MegatronBackend(path=tmp_path)
    backend = ls.TinkerBackend(path=tmp_path, api_key=KEY)
    await make().register(backend)
    await backend.close()
    with pytest.raises(StoreError, match="backend = 'tinker', not 'megatron'"):
        await make(base_model=str(service.folder)).register(other)
    with pytest.raises(StoreError, match="trained by TinkerBackend"):
        await serve_step(tmp_path / "p" / "m", None, print)


@pytest.mark.parametrize(
    "setting",
    [
        {"kl_coef": 0.1},
        {"old_logprobs": "trainer"},
        {"clip_dual": 3.0, "loss": "ppo"},
        {"minibatches": 2},
        {"row_length": 512},
        {"share_prefixes": False},
        {"seed": 1},
    ],
)
def test_settings_it_cannot_honour_are_named(setting):
    with pytest.raises(ConfigError, match=f"TinkerBackend does not support {next(iter(setting))} = "):
        check_train_config(ls.TrainConfig(**setting))


def test_gspo_says_what_to_set():
    with pytest.raises(
        ConfigError, match=r"old_logprobs = .trainer..*for gspo set old_logprobs, clip_low and clip_high"
    ):
        check_train_config(ls.TrainConfig(loss="gspo"))
    check_train_config(ls.TrainConfig(loss="gspo", old_logprobs="sampling", clip_low=0.1, clip_high=0.1))


def test_what_is_adapted():
    spec = get_model_support_spec("Qwen/Qwen3-30B-A3B")
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    for targets, parts in ((None, (True, True)), (attention, (True, False)), (("experts",), (False, True))):
        adapted = check_lora(ls.LoraConfig(target_modules=targets), spec)
        assert adapted == {"train_attn": parts[0], "train_mlp": parts[1], "train_unembed": False}
    for wrong, name in (
        (None, "lora = None"),
        (ls.LoraConfig(alpha=16), "lora.alpha"),
        (ls.LoraConfig(target_modules=("q_proj",)), "lora.target_modules"),
        (ls.LoraConfig(target_modules=("lm_head",)), "lora.target_modules"),
    ):
        with pytest.raises(ConfigError, match=f"TinkerBackend does not support {name}"):
            check_lora(wrong, spec)


def drawn(seed: int, temperature: float = 1.0):
    """A packed batch of sequences that share prefixes, with advantages and weights of their own."""
    random = np.random.default_rng(seed)
    sequences = [
        replace(sequence, temperatures_S=np.where(sequence.loss_mask_S, temperature, 1.0).astype(np.float32))
        for sequence in random_sequences(random, 6)
        if sequence.loss_mask_S.any()  # as in every trajectory
    ]
    size = len(sequences)
    return pack(sequences, random.normal(size=size), random.uniform(0.2, 2, size=size), seed=seed % 97)


@settings(max_examples=15, deadline=None)
@given(seeds)
@pytest.mark.parametrize("loss", ["cispo", "ppo", "gspo"])
def test_the_services_loss_is_ours(loss, seed):
    """What the service makes of the data, in value and gradient, off policy and clipped: the engine's loss of the batch."""
    batch = drawn(seed)
    far = {"clip_dual": 1e9} if loss == "ppo" else {}  # the service has no second clip
    config = ls.TrainConfig(loss=loss, clip_low=0.1, clip_high=0.15, **far)
    random = np.random.default_rng(seed + 1)
    news = np.where(batch.loss_mask_RS, batch.logprobs_RS + random.normal(size=batch.tokens_RS.shape) * 0.3, -1.0)
    new_RS = torch.tensor(news, dtype=torch.float64, requires_grad=True)
    ours = sum(
        policy_loss(scored_tensors(row, new_RS[number, row.index_N]), config).loss
        for number, row in ((number, scored_row(batch, number)) for number in range(batch.rows))
    ) / total_weight(batch)
    (expected_RS,) = torch.autograd.grad(ours, new_RS)
    low, high = config.clip_range
    theirs = 0.0
    for number, example in enumerate(examples_of(batch)):
        new_T = new_RS[int(batch.row_Q[number]), batch.path_index(number)][1:]
        inputs = {name: torch.from_numpy(value) for name, value in loss_inputs(example, loss).items()}
        clips = {"clip_low_threshold": low, "clip_high_threshold": high}
        theirs = theirs + fake_tinker.service_loss(loss, new_T, inputs, clips)
    (found_RS,) = torch.autograd.grad(theirs, new_RS)
    torch.testing.assert_close(found_RS, expected_RS, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.as_tensor(theirs), torch.as_tensor(ours), atol=1e-6, rtol=1e-5)


def test_examples_are_the_sequences_and_other_temperatures_are_refused():
    batch = drawn(7)
    for number, example in enumerate(examples_of(batch)):
        tokens = batch.tokens_RS[batch.row_Q[number], batch.path_index(number)].tolist()
        assert [*example.inputs_T.tolist(), example.targets_T[-1]] == tokens
        assert example.inputs_T[1:].tolist() == example.targets_T[:-1].tolist()
        assert not example.advantages_T[~example.scored_T].any()
        assert example.scored_T[-1]
    with pytest.raises(DataError, match=r"temperature = 0.7: TinkerBackend trains on temperature 1 only"):
        examples_of(drawn(7, temperature=0.7))


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ('on it<tool_call>{"name": "add", "arguments": {"a": "é"}}</tool_call>', "on it", ["add"]),
        (
            '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n<tool_call>{"name": "b", "arguments": {}}',
            None,
            ["a", "b"],
        ),
        ("<tool_call>{not json}</tool_call>", "<tool_call>{not json}</tool_call>", []),
        ('<tool_call>["name"]</tool_call>', '<tool_call>["name"]</tool_call>', []),
        ("plain", "plain", []),
    ],
)
def test_tool_calls_are_parsed(text, content, names):
    spoken, calls = chat_format.split_tool_calls(text)
    assert spoken == content
    assert [call["function"]["name"] for call in calls] == names
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)


def test_a_conversation_with_calls_renders_as_it_was_sampled(folder):
    """The prompt of the next turn starts with the ids of the turn before, so that the two train as one sequence."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = chat_format.ChatRequest(model="m@0", messages=QUESTION, tools=TOOLS)
    prompt = chat_format.render(first, tokenizer)
    text = 'on it<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
    sampled = chat_format.choice(first, tokenizer, prompt, tokens, [-1.0] * len(tokens), True, 0)
    assert (sampled["finish_reason"], sampled["message"]["content"]) == ("tool_calls", "on it")
    assert b"".join(bytes(part["bytes"]) for part in sampled["logprobs"]["content"][:-1]) == text.encode()
    turn = [*QUESTION, sampled["message"], {"role": "tool", "content": "2", "tool_call_id": "x"}]
    following = chat_format.render(chat_format.ChatRequest(model="m@0", messages=turn, tools=TOOLS), tokenizer)
    assert following[: len(prompt) + len(tokens)] == prompt + tokens
    quiet = chat_format.choice(
        first.model_copy(update={"tool_choice": "none"}), tokenizer, prompt, tokens, [-1.0] * len(tokens), False, 0
    )
    assert (quiet["finish_reason"], quiet["message"]["content"]) == ("length", text)


def test_the_stand_in_has_the_sdks_signatures():
    """Where the real package is installed: each call that the stand-in takes, the SDK takes too."""
    tinker = pytest.importorskip("tinker")
    for name, methods in {
        "ServiceClient": (
            "create_lora_training_client",
            "create_training_client_from_state_with_optimizer",
            "create_sampling_client",
            "close",
        ),
        "TrainingClient": (
            *("forward_backward", "optim_step", "save_state"),
            *("save_weights_for_sampler", "get_tokenizer"),
        ),
        "SamplingClient": ("sample",),
    }.items():
        for method in methods:
            ours = list(inspect.signature(getattr(getattr(fake_tinker, name), method)).parameters)
            theirs = list(inspect.signature(getattr(getattr(tinker, name), method)).parameters)
            assert ours == [parameter for parameter in theirs if parameter in ours], f"{name}.{method}"
            assert ours[: len(ours)] == theirs[: len(ours)] or set(ours) <= set(theirs)
    for kind in ("SamplingParams", "AdamParams"):
        fields = getattr(tinker, kind).model_fields
        for name, value in vars(getattr(fake_tinker, kind)()).items():
            assert fields[name].default == value, f"{kind}.{name}"


BARE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "megatron", "vllm", "peft", "tinker", "starlette", "uvicorn"}:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocked())
import asyncio
import lockstep as ls
from lockstep import TinkerBackend
from lockstep.models.registry import default_target_modules_for_model, get_model_config, list_model_support_specs
for spec in list_model_support_specs():
    found = get_model_config(spec.model_names[0])
    assert found.target_modules == tuple(default_target_modules_for_model(spec.model_names[0])) != ()
backend = TinkerBackend(path=sys.argv[1], api_key="k")
model = ls.TrainableModel(name="m", project="p", base_model="Qwen/Qwen3-30B-A3B-Instruct-2507")
try:
    asyncio.run(model.register(backend))
except ls.LockstepError as error:
    assert "pip install lockstep-rl[tinker]" in str(error), error
else:
    raise SystemExit("registered without the tinker package")
"""


def test_registry_and_backend_need_no_training_environment(tmp_path):
    done = subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
