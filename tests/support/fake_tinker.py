"""A stand-in for the `tinker` package: the part of its interface that TinkerBackend uses, over a small real model on this machine.

Names and signatures are those of tinker 0.38. What it computes is real: sampling from a Hugging Face model with a PEFT adapter, the
losses as the service documents them, gradients, AdamW. Saved weights outlive the client, as they do in the service.

Shape suffixes: T positions of a sequence, V vocabulary.
"""

from __future__ import annotations

import asyncio
import copy
import math
import types
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class TinkerError(Exception):
    """The base of the SDK's errors."""


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int | None = None
    seed: int | None = None
    stop: Any = None
    temperature: float = 1
    top_k: int = -1
    top_p: float = 1


@dataclass(frozen=True)
class ModelInput:
    ids: tuple[int, ...]

    @classmethod
    def from_ints(cls, tokens: list[int]) -> ModelInput:
        assert all(type(token) is int for token in tokens)
        return cls(tuple(tokens))


@dataclass(frozen=True)
class Datum:
    model_input: ModelInput
    loss_fn_inputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class AdamParams:
    learning_rate: float = 0.0001
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


def service_loss(
    loss_fn: str, new_T: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> torch.Tensor:
    """The service's loss of one sequence, a sum, from https://tinker-docs.thinkingmachines.ai/tinker/losses."""
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    old_T, advantage_T = inputs["logprobs"], inputs["advantages"]
    if loss_fn == "cispo":
        ratio_T = (new_T - old_T).exp().clamp(low, high)
        return -(ratio_T.detach() * new_T * advantage_T).sum()
    if loss_fn == "gspo":
        counted_T = inputs["sequence_ratio_mask"] != 0
        ratio_T = ((new_T.detach() - old_T)[counted_T].mean() + new_T - new_T.detach()).exp()
    else:
        assert loss_fn == "ppo"
        ratio_T = (new_T - old_T).exp()
    return -torch.minimum(ratio_T * advantage_T, ratio_T.clamp(low, high) * advantage_T).sum()


class Future:
    """APIFuture: awaited with a deadline."""

    def __init__(self, future: Any):
        self._future = future

    async def result_async(self, timeout: float | None = None) -> Any:
        async with asyncio.timeout(timeout):
            return await asyncio.wrap_future(self._future)


class Service:
    """What lives beyond one client: saved weights, and the one thread that computes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.saved: dict[str, Any] = {}
        self.clients: list[ServiceClient] = []
        self.refuse: set[str] = set()
        self.losses: list[tuple[str, dict[str, float]]] = []
        self._pool = ThreadPoolExecutor(1)
        self._runs = 0

    def do(self, what: str, work: Callable[[], Any]) -> Future:
        def run() -> Any:
            if what in self.refuse:
                raise TinkerError(f"no {what} today")
            return work()

        return Future(self._pool.submit(run))

    def new_run(self) -> str:
        self._runs += 1
        return f"tinker://run-{self._runs}"

    def module(self) -> types.ModuleType:
        """What `import tinker` gives."""
        module = types.ModuleType("tinker")
        for part in (TinkerError, SamplingParams, ModelInput, Datum, AdamParams):
            setattr(module, part.__name__, part)
        module.ServiceClient = lambda **settings: ServiceClient(self, **settings)  # type: ignore[attr-defined]
        return module


class ServiceClient:
    def __init__(self, service: Service, *, api_key: str, base_url: str | None = None):
        self._service, self.api_key, self.base_url = service, api_key, base_url
        self.closed: str | None = None
        service.clients.append(self)

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
    ) -> Future:
        assert not train_unembed

        def make() -> TrainingClient:
            torch.manual_seed(seed or 0)
            targets = [*(ATTENTION if train_attn else ()), *(MLP if train_mlp else ())]
            model = AutoModelForCausalLM.from_pretrained(self._service.folder, dtype=torch.float32)
            adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=targets))
            return TrainingClient(self._service, adapted, None)

        return self._service.do("create", make)

    def create_training_client_from_state_with_optimizer(self, path: str) -> Future:
        def load() -> TrainingClient:
            model, moments = copy.deepcopy(self._service.saved[path])
            return TrainingClient(self._service, model, moments)

        return self._service.do("load", load)

    def create_sampling_client(self, model_path: str) -> Future:
        return self._service.do("sampler", lambda: SamplingClient(self._service, self._service.saved[model_path]))

    def close(self, status: str, detail: str | None = None) -> Future:
        self.closed = status
        return self._service.do("close", lambda: None)


class TrainingClient:
    def __init__(self, service: Service, model: Any, moments: Any):
        self._service, self._model, self._run = service, model, service.new_run()
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights)
        if moments is not None:
            self._optimizer.load_state_dict(moments)
        self._optimizer.zero_grad()

    def get_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._service.folder)

    def forward_backward(self, data: list[Datum], loss_fn: str, loss_fn_config: Mapping[str, float]) -> Future:
        def work() -> Any:
            self._service.losses.append((loss_fn, dict(loss_fn_config)))
            total, outputs = 0.0, []
            for datum in data:
                inputs = {name: torch.from_numpy(value) for name, value in datum.loss_fn_inputs.items()}
                logits_TV = self._model(torch.tensor([datum.model_input.ids])).logits[0]
                new_T = logits_TV.log_softmax(-1).gather(1, inputs["target_tokens"][:, None])[:, 0]
                loss = service_loss(loss_fn, new_T, inputs, loss_fn_config)
                loss.backward()
                total += loss.item()
                outputs.append({"logprobs": new_T.detach()})
            return types.SimpleNamespace(loss_fn_outputs=outputs, metrics={"loss:sum": total})

        return self._service.do("forward_backward", work)

    def optim_step(self, optim_params: AdamParams) -> Future:
        def work() -> None:
            if optim_params.grad_clip_norm > 0:
                torch.nn.utils.clip_grad_norm_(self._weights, optim_params.grad_clip_norm)
            for group in self._optimizer.param_groups:
                group |= {"lr": optim_params.learning_rate, "betas": (optim_params.beta1, optim_params.beta2)}
                group |= {"eps": optim_params.eps, "weight_decay": optim_params.weight_decay}
            self._optimizer.step()
            self._optimizer.zero_grad()

        return self._service.do("optim_step", work)

    def _save(self, kind: str, name: str, work: Callable[[], Any]) -> Future:
        path = f"{self._run}/{kind}/{name}"

        def save() -> Any:
            assert path not in self._service.saved, f"{path} exists"
            self._service.saved[path] = work()
            return types.SimpleNamespace(path=path)

        return self._service.do(kind, save)

    def save_state(self, name: str) -> Future:
        return self._save("weights", name, lambda: copy.deepcopy((self._model, self._optimizer.state_dict())))

    def save_weights_for_sampler(self, name: str) -> Future:
        return self._save("sampler_weights", name, lambda: copy.deepcopy(self._model))


class SamplingClient:
    def __init__(self, service: Service, model: Any):
        self._service, self._model = service, model
        self._end = AutoTokenizer.from_pretrained(service.folder).eos_token_id

    def sample(self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams) -> Future:
        def work() -> Any:
            seed = sampling_params.seed
            source = torch.Generator()
            source.manual_seed(torch.seed() if seed is None else seed)
            sequences = [self._one(prompt, sampling_params, source) for _ in range(num_samples)]
            return types.SimpleNamespace(sequences=sequences)

        return self._service.do("sample", work)

    @torch.no_grad()
    def _one(self, prompt: ModelInput, settings: SamplingParams, source: torch.Generator) -> Any:
        assert settings.top_p == 1
        assert settings.top_k == -1
        ids, tokens, logprobs = list(prompt.ids), [], []
        while len(tokens) < (settings.max_tokens or math.inf):
            logits_V = self._model(torch.tensor([ids])).logits[0, -1]
            scaled_V = (logits_V / (settings.temperature or 1)).log_softmax(-1)
            drawn = (
                scaled_V.argmax()
                if not settings.temperature
                else torch.multinomial(scaled_V.exp(), 1, generator=source)
            )
            tokens.append(int(drawn))
            ids.append(int(drawn))
            logprobs.append(float(scaled_V[int(drawn)]))
            if tokens[-1] == self._end:
                break
        reason = "stop" if tokens and tokens[-1] == self._end else "length"
        return types.SimpleNamespace(tokens=tokens, logprobs=logprobs, stop_reason=reason)
