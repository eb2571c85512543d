"""Scores of the probe on both sides, and what follows from them: the noise at registration, and a
step's verification.

Shape suffixes: S tokens, L layers, K experts per token, T scored tokens of all sequences end to
end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lockstep.backends.megatron import probe as probing
from lockstep.backends.megatron.probe import ROW, TOKENS, Probe, ProbeScores
from lockstep.backends.megatron.run import Run
from lockstep.batching.pack import pack, save_batch
from lockstep.batching.packed_batch import unpack_scores
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.batching.routed_experts import decode_routed_experts
from lockstep.batching.top_logprobs import TOP
from lockstep.config import deadlines
from lockstep.inference.client import Server, logprobs_of, most_likely
from lockstep.trainer.protocol import Score

_TEXT = """\
The lighthouse keeper wrote down the weather every evening, although nobody had asked for the figures in eleven years. Wind from the
north-west, four to five; rain before midnight; visibility two miles. He liked the rows of numbers, and he liked to compare them: on the
same day in 1968 there had been snow, and the harbour had frozen over for the first time in a century. What would the next hundred years
bring? "More of the same," said his daughter, who taught physics in the town, "only warmer." She explained it to him with a kettle, a
thermometer and a sheet of paper: if 2.5 litres of water take 8 minutes to boil, then 10 litres take 4 x 8 = 32 minutes, provided that
the flame stays the same.

On Monday a letter came. Dear Sir, it began, we have read your records with great interest and would like to ask three questions. First,
which instrument did you use before 1975? Second, were the readings taken at the same hour in summer and in winter? Third, may we copy
the notebooks, all forty-one of them? He answered the same night. The instrument was a mercury barometer, made in Hamburg; the hour was
always six o'clock by the church bell; and yes, they could have the notebooks, if they sent somebody who was careful with paper.

Two students arrived in June with a camera and a laptop. They photographed 12,300 pages in nine days, and wrote a small program:

    def mean(values):
        total = 0
        for value in values:
            total = total + value
        return total / len(values)

    print(mean([3, 4, 5]))  # 4.0

It found two mistakes. On 3 March 1981 he had written 1031 instead of 1013, and one page had been skipped altogether. "Nobody is
perfect," he said, and laughed. The answer to the question that had brought them was simple in the end: the storms had not become more
frequent, but each of the ten strongest had come after 1990. The students thanked him, packed their things, and took the evening boat. He
watched the lights until they were gone. Then he opened notebook forty-two and wrote: wind from the south, two; no rain; visibility
excellent.
"""


async def first_probe(run: Run) -> Probe:
    """A fixed English text in the model's own tokens: there are no rollouts yet."""
    return Probe.of_text(await run.server.tokenize(_TEXT), longest(run), enough(run))


def longest(run: Run) -> int:
    """Tokens of the longest sequence to score: the server wants room for one more."""
    return min(run.settings.max_model_len - 1, ROW)


def enough(run: Run) -> int:
    """Tokens of a probe. Where a CPU's server needs Triton's interpreter, 512 would take longer
    than many a step.
    """
    interpreted = run.settings.devices.kind == "cpu" and (run.settings.routed_experts is not None or run.settings.exact)
    return TOKENS // 4 if interpreted else TOKENS


async def measure_noise(run: Run) -> None:
    """Sets the run's probe and noise. The server, which is awake, and the trainer hold the base
    weights; then it is the trainer's turn.

    Raises MismatchError where they differ by more than the precision explains.
    """
    run.probe = await first_probe(run)
    seen = [await served_scores(server, f"{run.model.name}@base", run.probe) for server in run.servers]
    await run.gpus.give_to_trainer(forget_weights=run.delivery.replaces)
    trained = None
    noises = []
    for server, (served, choices) in zip(run.servers, seen, strict=True):
        if trained is None or run.settings.routed_experts is not None:
            trained = await trained_scores(run, on_served_experts(run, run.probe, choices))
        noises.append(probing.base_noise(served, trained, run.numerics, server.child.log_path))
    run.noise = max(noises, key=lambda noise: noise.scaled)


async def served_scores(server: Server, name: str, probe: Probe) -> tuple[ProbeScores, list[dict[str, Any]]]:
    """The server's scores under `name`, in one request, and its choices."""
    choices = await server.score_choices(name, probe.tokens, TOP)
    pairs = list(zip(choices, probe.tokens, strict=True))
    logprobs = [value for choice, tokens in pairs for value in logprobs_of(choice, tokens)]
    top = [row for choice, _ in pairs for row in most_likely(choice, TOP)]
    return ProbeScores(np.array(logprobs), np.array(top)), choices


async def trained_scores(run: Run, probe: Probe) -> ProbeScores:
    """The trainer's scores, on the experts that the probe names. One row of a length that never
    changes.
    """
    batch_path, out = (run.store.path / "batches" / name for name in ("probe.safetensors", "probe-scores.safetensors"))
    count = len(probe.sequences)
    batch = pack(probe.sequences, np.zeros(count), np.ones(count), row_length=ROW, data=run.settings.parallel.data)
    await asyncio.to_thread(save_batch, batch, batch_path)
    await run.trainer.call(Score(batch_path, out, TOP), deadline_s=deadlines.STEP_S)
    scores = await asyncio.to_thread(load_file, out)
    logprobs_T, top_TV = (np.concatenate(unpack_scores(batch, scores[name])) for name in ("logprobs_RS", "top_RSC"))
    return ProbeScores(logprobs_T.astype(np.float64), top_TV)


def on_served_experts(run: Run, probe: Probe, choices: Sequence[dict[str, Any]]) -> Probe:
    """The probe on the experts that the server used for it; as it is where none are captured."""
    if run.settings.routed_experts is None:
        return probe
    return probe.with_routed_experts(
        [
            decode_routed_experts(
                choice.get("routed_experts"),
                choice.get("routed_experts_digest"),
                choice["prompt_token_ids"],
                choice["token_ids"],
                run.settings.routed_experts,
                "the probe",
            )
            for choice in choices
        ]
    )


class BeforeStep:
    """The trainer's scores before a step, on text of the step's rollouts. They show how far the
    step moves the policy.
    """

    def __init__(self, probe: Probe, scores: ProbeScores) -> None:
        self.probe, self.scores = probe, scores

    @classmethod
    async def score(cls, run: Run, sequences: Sequence[TokenSequence]) -> BeforeStep:
        probe = Probe.of_rollouts(sequences, longest(run), enough(run))
        return cls(probe, await trained_scores(run, probe))

    async def after(self, run: Run, number: int) -> tuple[ProbeScores, float]:
        """The trainer's scores after the step, on the same experts, and the verification's power.

        Raises TrainerError when anything the step computes is not finite.
        """
        assert run.noise is not None
        scores = await trained_scores(run, self.probe)
        probing.check_finite(run.name(number), scores, "the weights are unchanged, lower learning_rate")
        return scores, probing.power(self.scores, scores, run.noise)


async def verify(
    run: Run, number: int, trained: ProbeScores | None, servers: Sequence[Server] | None = None
) -> dict[str, float]:
    """Each server computes what the trainer does (`probe.compare`). Returns the figures of the one
    that is furthest from the trainer.

    trained: the trainer's scores of the run's probe, if they are known.
    servers: None: all of the run's.
    """
    assert run.probe is not None
    assert run.noise is not None
    name, seen = run.name(number), []
    for server in tuple(servers or run.servers):
        served, choices = await served_scores(server, name, run.probe)
        if trained is None:
            await run.gpus.give_to_trainer(forget_weights=False)
            trained = await trained_scores(run, on_served_experts(run, run.probe, choices))
            await run.gpus.give_to_server()
        seen.append(probing.compare(name, served, trained, run.noise, run.numerics, server.child.log_path))
        if run.settings.routed_experts is not None:
            trained = None  # the next server chose its own experts
    return max(seen, key=lambda figures: figures["probe_ratio"])
