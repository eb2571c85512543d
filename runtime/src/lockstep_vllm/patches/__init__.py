"""Every change that Lockstep makes to vLLM's own code: the module, the platform, the reason, and
the test that ends it.

All of them are written for vLLM `VLLM_SERIES`; another version is refused before any is applied
(`plugin.py`). Modules are imported when they are applied, since vLLM may not be imported earlier.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Patch:
    """One change to vLLM.

    module: below `lockstep_vllm`. Its `apply()` makes the change, unless the module's own variable
        switches the change off.
    process: where the change is made: in "every" process of the server, or in the "api" process or
        a "worker" alone.
    gone_when: tests that fail when vLLM needs the change no more, so that we delete the module.
        Empty: vLLM will always need the change.
    """

    module: str
    process: Literal["every", "api", "worker"]
    platform: Literal["any", "cpu"]
    why: str
    gone_when: str


PATCHES = (
    Patch(
        "routed_experts.capture",
        "every",
        "any",
        "vLLM copies routed experts per request and token; the pool keeps them where the keys are",
        "tests/server/replay/test_routed_experts_capture.py",
    ),
    Patch(
        "patches.cpu_reload",
        "every",
        "cpu",
        "packed experts and a tied output head keep old weights after a reload",
        "tests/server/kernels/test_cpu_reload.py",
    ),
    Patch(
        "patches.cpu_lora",
        "every",
        "cpu",
        "adapters gather a matrix per token, and give wrong results in mixed batches",
        "tests/server/kernels/test_lora_cpu.py",
    ),
    Patch(
        "patches.cpu_amx",
        "every",
        "cpu",
        "experts in bfloat16 use AMX without asking Linux for it, which ends the server at its first token",
        "tests/server/test_verification.py",
    ),
    Patch(
        "patches.cpu_seeded_chunks",
        "every",
        "cpu",
        "a seeded prompt that is computed in pieces ends the server",
        "tests/server/test_turns.py",
    ),
    Patch(
        "patches.cpu_interpreted",
        "every",
        "cpu",
        "interpreted kernels of a hybrid model's cache, most of whose programs do nothing, take half of the time",
        "",
    ),
    Patch("patches.cpu_waiting", "every", "cpu", "processes spin while they wait for each other", ""),
    Patch(
        "patches.cpu_moe_lora",
        "every",
        "cpu",
        "adapters on routed experts are accepted at the start and end the server at the first request",
        "tests/server/kernels/test_served_adapters.py",
    ),
    Patch("patches.cpu_plain_weights", "every", "cpu", "packed weights can't be read back or written in place", ""),
    Patch("patches.exact_fp64", "every", "cpu", "numerics = exact computes in fp64", "tests/server/test_exact.py"),
    Patch("patches.cpu_fork", "every", "cpu", "spawning engine core and workers imports torch and vLLM again", ""),
    Patch("patches.held_outputs", "every", "any", "the engine sends each token of each request by itself", ""),
    Patch(
        "http.sampled_tokens",
        "api",
        "any",
        "tokens carry the version of the weights that sampled them, and log-probabilities come as numbers alone",
        "",
    ),
    Patch("http.continued_prompts", "api", "any", "a chat can't continue with the ids that were sampled", ""),
    Patch("http.served_names", "api", "any", "a 404 lists the base weights' names, and no version that is served", ""),
    Patch("adapters.from_memory", "worker", "any", "adapters come from memory and not from a folder", ""),
)
"""In the order in which they are applied."""


def apply(process: Literal["every", "api", "worker"], on_cpu: bool) -> None:
    """Apply what belongs to this kind of process here."""
    for patch in PATCHES:
        if patch.process == process and (on_cpu or patch.platform == "any"):
            importlib.import_module(f"lockstep_vllm.{patch.module}").apply()
