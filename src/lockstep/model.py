"""TrainableModel: what is trained, under which name, and how to talk to its current version."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lockstep.config import deadlines
from lockstep.config.lora import LoraConfig
from lockstep.errors import ConfigError
from lockstep.rollouts.leases import Leases, RolloutScope, current_scope, rollout_scope
from lockstep.rollouts.noise import RequestSeeds, current_place
from lockstep.rollouts.router import Router
from lockstep_wire import http_paths, siblings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from lockstep.backends.base import Backend, Endpoint
    from lockstep.gateway.episode import Episode
    from lockstep.gateway.other_model import OtherModel
    from lockstep.gateway.server import Gateway

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RETRIES = 3
_DEFAULT_LORA = LoraConfig()


def version_name(name: str, step: int) -> str:
    """The name under which step `step` of model `name` is served: "name@3"."""
    return f"{name}@{step}"


def _check_segment(kind: str, value: str) -> str:
    if not _SEGMENT.fullmatch(value):
        raise ConfigError(
            f"{kind} {value!r} can't be a folder and a model id: use letters, digits, '.', '_' and '-', "
            "starting with a letter or digit, at most 128"
        )
    return value


def open_client(
    endpoint: Endpoint, seed: Callable[[], int | None] = lambda: None, servers: Router | None = None
) -> AsyncOpenAI:
    """A client of a run's own server. The caller closes it.

    It sends what the server has places for (`slots.py`); a deadline counts from then.

    seed: asked once for each request that samples and sets none itself; None leaves the noise to
        the server.
    servers: says which of several servers answers.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

    from lockstep.rollouts.connections import connections_for
    from lockstep.rollouts.seeded import SeededRequests
    from lockstep.rollouts.siblings import SiblingRequests
    from lockstep.rollouts.slots import Slots, SlotSending

    class Client(SlotSending, DefaultAsyncHttpxClient):
        slots = None if endpoint.slots is None else Slots(endpoint.slots)
        default_s = deadlines.REQUEST_S
        longest = endpoint.max_model_len or 0
        router = servers

    class RolloutClient(SeededRequests, SiblingRequests, AsyncOpenAI):
        next_seed = staticmethod(seed)
        siblings_url = endpoint.base_url.removesuffix("/v1") + http_paths.SIBLINGS if endpoint.siblings else None
        most_siblings = min(endpoint.slots or siblings.MOST, siblings.MOST)

    return RolloutClient(
        base_url=endpoint.base_url,
        api_key=endpoint.api_key,
        timeout=Timeout(deadlines.REQUEST_S, connect=deadlines.CONNECT_S),
        max_retries=_RETRIES,
        http_client=Client(
            trust_env=False, transport=connections_for(Client)
        ),  # a proxy must not catch the run's own server
    )


class TrainableModel:
    """A model to train. Files go to <backend path>/<project>/<name>; step N is served as
    `<name>@N`.

    base_model: a Hugging Face id or a folder.
    lora: the adapter's shape; None trains all weights.

    Raises ConfigError for a name or project that can't be a folder and a model id.
    """

    def __init__(self, *, name: str, project: str, base_model: str, lora: LoraConfig | None = _DEFAULT_LORA):
        self.name = _check_segment("model name", name)
        self.project = _check_segment("project", project)
        if not base_model:
            raise ConfigError(f"model {name}: base_model is empty: give a Hugging Face id or a folder")
        self.base_model = base_model
        self.lora = lora
        self._backend: Backend | None = None
        self._step = -1
        self._leases = Leases()
        self._seeds = RequestSeeds()
        self._client: tuple[Endpoint, asyncio.AbstractEventLoop | None, AsyncOpenAI] | None = None
        self._gateway: Gateway | None = None
        self._router = Router(lambda: self._registered().endpoint(self).replicas)

    def __repr__(self) -> str:
        state = f"step={self._step}" if self._backend is not None else "not registered"
        return f"TrainableModel({self.project}/{self.name}, {self.base_model}, {state})"

    async def register(self, backend: Backend) -> None:
        """Start serving and training this model on `backend`, at its last published step.

        Raises ConfigError if it is already registered with another backend, and whatever the
        backend raises.
        """
        if self._backend is not None and self._backend is not backend:
            raise ConfigError(f"model {self.name} is already registered with another backend: close that one first")
        step = await backend.register(self)
        self._backend, self._step = backend, step
        self._seeds = RequestSeeds()  # a process that begins at this step counts from here

    def _registered(self) -> Backend:
        if self._backend is None:
            raise ConfigError(f"model {self.name} is not registered: await model.register(backend) first")
        return self._backend

    @property
    def step(self) -> int:
        """The step that is served now; once the backend is closed, the last one that was."""
        if self._step < 0:
            self._registered()
        return self._step

    def _advance(self, step: int) -> None:
        """The server now serves `step`. Called by the backend."""
        if step <= self._step:
            raise ValueError(f"model {self.name} is at step {self._step}, it can't go to {step}")
        self._step = step

    def inference_name(self, step: int | None = None) -> str:
        """The model id to ask the server for: "name@3". `step` None: the current step.

        Inside a rollout of `gather_trajectory_groups`, the first call decides the version of the
        full rollout. That version stays loaded until the rollout ends.
        """
        current, scope = self.step, current_scope()
        if scope is not None and step is None:
            step = scope.pin(self._leases, current)
        elif scope is not None and step is not None:
            scope.hold(self._leases, step)
        return version_name(self.name, current if step is None else step)

    @contextmanager
    def at_step(self, step: int) -> Iterator[None]:
        """Rollouts that begin inside use `step`, which stays loaded until the end."""
        with rollout_scope() as scope:
            scope.pin(self._leases, step)
            yield

    def pinned_step(self, scope: RolloutScope) -> int | None:
        """The step that a rollout uses; None before it asked for one."""
        step = scope.pinned(self._leases, -1)
        return None if step < 0 else step

    def leased_steps(self) -> frozenset[int]:
        """Steps that running rollouts use; the backend must keep them loaded."""
        return self._leases.steps()

    def openai_client(self) -> AsyncOpenAI:
        """A plain AsyncOpenAI on the run's server, reused between calls.

        Requests beyond what the server takes at once wait here, those of rollouts under way first.
        Lost connections and overload are retried. A request may take 600 s and a second for each
        token it may sample, counted from when the server takes it.

        In a rollout of gather, a request without a `seed` gets one. The seed follows from the run's
        seed, the step, the rollout's position and the number of its earlier requests. The choices
        of one request (`n`) differ.
        """
        endpoint = self._registered().endpoint(self)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        known = self._client  # connections belong to one event loop; the router finds a replica's new address
        if known is None or known[1] != loop or not (endpoint.replicas or known[0] == endpoint):
            router = self._router if endpoint.replicas else None
            self._client = (endpoint, loop, open_client(endpoint, lambda: self._next_seed(endpoint.seed), router))
            return self._client[2]
        return known[2]

    def _next_seed(self, run_seed: int | None) -> int | None:
        """The seed of the next request; None outside of rollouts, or where the run does not seed
        requests.
        """
        scope, place = current_scope(), current_place()
        if run_seed is None or scope is None or place is None:
            return None
        return self._seeds.draw(run_seed, scope.pinned(self._leases, self.step), place)

    def episode(
        self, *, sampling: Mapping[str, Any] | None = None, models: Mapping[str, OtherModel] | None = None
    ) -> Episode:
        """An address and a key for one attempt of an agent, in this process or any other; what it samples there is captured.

        sampling: settings that every request of the episode has, whatever the agent asks for, such as `{"temperature": 1.0}`.
        models: who answers in place of this model, by the name that the agent asks for; `"claude-haiku*"` stands for all names
            that begin so. Such calls are counted and not trained.

        Inside a rollout the episode uses the rollout's version and ends with it at the latest. Elsewhere its version is the
        current one and stays loaded until the episode ends. In a rollout that gather runs, a request without a `seed` gets one,
        derived from the rollout's place, the request's messages, and how often the episode sent them before.
        """
        from lockstep.gateway.calls import Terms
        from lockstep.gateway.server import Gateway

        backend, name, scope = self._registered(), self.inference_name(), current_scope()
        if self._gateway is None:
            self._gateway = Gateway()
        step = int(name.rpartition("@")[2])
        self._leases.take(step)
        seed = self._next_seed(backend.endpoint(self).seed)
        hold = self._router.hold_of_episode(scope) if backend.endpoint(self).replicas else None

        def address() -> Endpoint:
            endpoint = backend.endpoint(self)
            return endpoint if hold is None else endpoint.served_by(hold.replica())

        def ended() -> None:
            self._leases.give_back(step)
            if hold is not None:
                hold.end()

        broke_off = hold.broke_off if hold is not None else None
        terms = Terms(name, address, dict(sampling or {}), seed, broke_off, dict(models or {}))
        episode = self._gateway.episode(terms, ended)
        if scope is not None:
            scope.at_end(episode.end)
        return episode

    async def _released(self) -> None:
        """The backend was closed: any other may take the model. Called by the backend."""
        self._backend = None
        gateway, self._gateway = self._gateway, None
        if gateway is not None:
            await asyncio.to_thread(gateway.close)
        await self._disconnect()

    async def _disconnect(self) -> None:
        """Close the client's connections. Called by the backend, when the server they lead to ends."""
        client, self._client = self._client, None
        if (
            client is not None and client[1] is asyncio.get_running_loop()
        ):  # another loop's connections are not ours to touch
            await client[2].close()
