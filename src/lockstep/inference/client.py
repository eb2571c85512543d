"""The running server as the rest of Lockstep sees it: adapters, scores, what is in flight, its end."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from lockstep.config import deadlines
from lockstep.errors import ServerError
from lockstep.inference.log import why_it_ended
from lockstep.inference.vllm_args import adapter_fields
from lockstep.process.child import Child
from lockstep_wire import http_paths


class Server:
    """A vLLM server under its guard, spoken to over loopback with the run's token. Every call has a
    deadline.

    `base_url` (with `/v1`) and `api_key` are what an OpenAI client needs.
    """

    def __init__(self, child: Child, port: int, api_key: str, served_name: str, replica: int = 0) -> None:
        """replica: its place among the run's servers, from 0."""
        self.child = child
        self.replica = replica
        self.root_url = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.root_url}/v1"
        self.api_key = api_key
        self.served_name = served_name
        self.hung = ""
        """Why its watch has ended it (`watch.py`)."""
        self.closing = threading.Event()

    async def load_adapter(self, name: str, path: Path) -> None:
        """Serves the PEFT folder `path` as model `name`, once its slot was read back and holds what
        the folder does. One name and one unchanging folder per version.

        Raises ServerError if the name is taken, the folder is not an adapter for this model, or the
        slot holds anything else.
        """
        body = {"lora_name": name, "lora_path": str(path.resolve()), **adapter_fields(path)}
        await self.call("POST", "/v1/load_lora_adapter", body, deadline_s=deadlines.ADAPTER_S)
        body = {"name": name, "path": str(path.resolve())}
        await self.call("POST", http_paths.SYNC_VERIFY_FOLDER, body, deadline_s=deadlines.ADAPTER_S)

    async def unload_adapter(self, name: str) -> None:
        """Stops serving an adapter. Raises ServerError if it isn't served."""
        await self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, deadline_s=deadlines.ADAPTER_S)
        await self.call("POST", http_paths.SYNC_FORGET_ADAPTER, {"name": name}, deadline_s=deadlines.ADAPTER_S)

    async def models(self) -> list[str]:
        """Names served now: the base model's first, then the adapters'."""
        reply = (await self.call("GET", "/v1/models")).json()
        return [entry["id"] for entry in reply["data"]]

    async def score(self, model: str, tokens: list[int]) -> list[float]:
        """Log-probability (nats, temperature 1) of each token after the first under `model`,
        computed afresh.

        vLLM reads no prefix cache for a request that asks for its prompt's logprobs. So the reply
        shows the weights and the adapter that the server holds now. The server's context must have
        room for one token more than these.
        """
        return (await self.score_choice(model, tokens))[0]

    async def score_choice(self, model: str, tokens: list[int], top: int = 0) -> tuple[list[float], dict[str, Any]]:
        """`score`, and the whole choice of the reply: where routed experts are captured, it has
        those of all `tokens`.

        top: also the most likely ids in each token's place, for `most_likely`; the server gives at
            most 20.
        """
        choice = (await self.score_choices(model, [tokens], top))[0]
        return logprobs_of(choice, tokens), choice

    async def score_choices(self, model: str, sequences: list[list[int]], top: int = 0) -> list[dict[str, Any]]:
        """`score_choice` of several sequences in one request: the choices, in order, for
        `logprobs_of` and `most_likely`.
        """
        for tokens in sequences:
            if len(tokens) < 2:
                raise ValueError(f"a sequence to score needs at least 2 tokens, got {len(tokens)}")
        body = {"model": model, "prompt": sequences, "max_tokens": 1, "prompt_logprobs": top, "temperature": 1.0}
        reply = (await self.call("POST", http_paths.COMPLETIONS, body, deadline_s=deadlines.ADAPTER_S)).json()
        return sorted(reply["choices"], key=lambda choice: choice["index"])

    async def tokenize(self, text: str) -> list[int]:
        """Ids of a plain text, by the model's own tokenizer."""
        body = {"model": self.served_name, "prompt": text, "add_special_tokens": True}
        return (await self.call("POST", "/tokenize", body)).json()["tokens"]

    async def rename(self, name: str) -> None:
        """Serves the base model as `name` from now on, and no longer under its old name."""
        await self.call("POST", http_paths.SERVED_NAME, {"name": name})
        self.served_name = name

    async def keep_names(self, names: list[str]) -> None:
        """Older names that the base model answers to as well, from now on and after the next
        rename; any others are dropped.

        Every reply says by which weights it was made, in its `model` and its `weight_versions`.
        """
        await self.call("POST", http_paths.KEPT_NAMES, {"names": names})

    async def version(self) -> dict[str, Any]:
        """`version` of the base weights, `names` they answer to (the current first), and the parts
        that are `asleep`.
        """
        return (await self.call("GET", http_paths.VERSION)).json()

    async def sleep(self, level: int, *, deadline_s: float) -> None:
        """Lets requests in flight finish, then gives the device's memory away; requests that come
        meanwhile wait.

        level: 1 keeps the weights on the host, 2 forgets them.

        Raises ServerError, with the server awake, if requests are still in flight after
        `deadline_s`.
        """
        body = {"level": level, "deadline_s": deadline_s}
        await self.call("POST", http_paths.SLEEP, body, deadline_s=deadline_s + deadlines.CALL_S)

    async def wake(self, *parts: str) -> None:
        """Takes the memory of `parts` ("weights", "kv_cache") back; all of them, and requests go
        on, when none is named.
        """
        body = {"parts": list(parts or ("weights", "kv_cache"))}
        await self.call("POST", http_paths.WAKE, body, deadline_s=deadlines.ADAPTER_S)

    async def memory(self) -> list[dict[str, int]]:
        """Bytes of each worker: `resident` on the host; on a GPU also `reserved`, `device_free` and
        `device_total`.
        """
        return (await self.call("GET", http_paths.MEMORY)).json()["workers"]

    async def in_flight(self) -> dict[str, int]:
        """Requests being served now, by the model name they asked for."""
        return (await self.status())["in_flight"]

    async def status(self) -> dict[str, Any]:
        """vLLM's version and what is in flight, from the plugin's own endpoint."""
        return (await self.call("GET", http_paths.STATUS)).json()

    async def counters(self, *names: str) -> list[float]:
        """The server's own counters and gauges of these names (without `vllm:`), each summed over
        its labels.

        Raises ServerError for one that it does not have.
        """
        text = (await self.call("GET", "/metrics")).text
        samples = [re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for name in names]
        for name, values in zip(names, samples, strict=True):
            if not values:
                raise ServerError(f"{self.child.name} has no counter {name}")
        return [sum(map(float, values)) for values in samples]

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, deadline_s: float = deadlines.CALL_S
    ) -> httpx.Response:
        """One request with the token. Raises ServerError on a refusal, a missed deadline or a dead
        server.
        """
        headers = {"Authorization": f"Bearer {self.api_key}"}
        # One client per call: this object may be used from several event loops, a client may not.
        # No proxy for loopback.
        async with httpx.AsyncClient(timeout=deadline_s, verify=False, trust_env=False) as client:
            try:
                request = client.request(method, self.root_url + path, json=body, headers=headers)
                response = await asyncio.wait_for(request, deadline_s)
            except (httpx.TimeoutException, TimeoutError):
                self.check_alive()
                raise ServerError(
                    f"{self.child.name} did not answer {method} {path} within {deadline_s:g} s "
                    f"(log: {self.child.log_path})"
                ) from None
            except httpx.TransportError as error:
                await self._noticed_end()
                raise ServerError(
                    f"{self.child.name} broke off {method} {path}: {error or type(error).__name__}"
                ) from None
        if response.status_code >= 400:
            raise ServerError(
                f"{self.child.name} refused {method} {path} ({response.status_code}): {_message(response)}"
            )
        return response

    async def problem(self) -> str:
        """Why the server can't serve any more, in one line: it ended, or its engine did. Empty for
        a server that lives, slow or not.
        """
        async with httpx.AsyncClient(timeout=deadlines.HEALTH_S, verify=False, trust_env=False) as client:
            try:
                reply = await client.get(f"{self.root_url}/health", headers={"Authorization": f"Bearer {self.api_key}"})
            except httpx.TimeoutException:
                return "" if self.child.poll() is None else self._ending()
            except httpx.TransportError as error:
                try:
                    await self._noticed_end()
                except ServerError as ended:
                    return str(ended)
                return f"{self.child.name} takes no connection: {error or type(error).__name__}"
        return "" if reply.status_code < 400 else why_it_ended(self.child, "has lost its engine")

    def check_alive(self) -> None:
        """Raises ServerError, with the log's last lines, if the server has ended."""
        if self.child.poll() is not None:
            raise ServerError(self._ending())

    def _ending(self) -> str:
        return why_it_ended(self.child, self.hung or f"ended with status {self.child.poll()}")

    async def close(self) -> None:
        """Ends the server and everything it started, at once; harmless when it has ended.

        Uses SIGKILL. On a request to end, vLLM also kills its engine, which then can't remove their
        shared memory.
        """
        self.closing.set()
        await asyncio.to_thread(self.child.kill)

    async def _noticed_end(self) -> None:
        """A broken connection mostly means that the server is going down: gives the guard a moment
        to notice.
        """
        for _ in range(20):
            self.check_alive()
            await asyncio.sleep(0.1)


def logprobs_of(choice: dict[str, Any], tokens: list[int]) -> list[float]:
    """Log-probability of each token after the first of a prompt that was scored."""
    entries = zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)
    return [float(entry[str(token)]["logprob"]) for token, entry in entries]


def most_likely(choice: dict[str, Any], count: int) -> list[list[int]]:
    """The ids of `most_likely_logprobs`, best first."""
    return [list(entry) for entry in most_likely_logprobs(choice, count)]


def most_likely_logprobs(choice: dict[str, Any], count: int) -> list[dict[int, float]]:
    """Log-probabilities of the `count` most likely ids, best first, at each token after the first
    of a prompt that was scored with `top=count`.
    """
    entries: list[dict[str, dict[str, Any]]] = choice["prompt_logprobs"][1:]
    # The token that stands there comes too, whatever its rank.
    return [best({int(token): value["logprob"] for token, value in entry.items()}, count) for entry in entries]


def best(logprobs: Mapping[int, float], count: int) -> dict[int, float]:
    """The `count` most likely of some tokens, best first."""
    return dict(sorted(logprobs.items(), key=lambda entry: -entry[1])[:count])


def _message(response: httpx.Response) -> str:
    """vLLM's own words from an error reply, in one line."""
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:500]
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:500]
