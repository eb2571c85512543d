"""vLLM's own offline generation of the requests that `rollouts.py` sends: run by it, in the server's environment.

    PYTHON rollouts_offline.py JOB.json RESULT.json

The job names the model, the prompts' token ids, the reply lengths, and how often to repeat. The result has tokens per
second of each repetition, by reply length: `plain` samples, and `logprobs` also returns each token's log-probability.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    engine = LLM(**job["engine"])
    prompts: list[Any] = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    rates: dict[str, dict[str, list[float]]] = {"plain": {}, "logprobs": {}}
    for tokens in job["tokens"]:
        for kind in rates:
            logprobs = 0 if kind == "logprobs" else None
            settings = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs)
            seconds = []
            for _ in range(job["repeat"] + 1):
                engine.reset_prefix_cache()
                started = time.perf_counter()
                replies = engine.generate(prompts, settings, use_tqdm=False, lora_request=adapter)
                seconds.append(time.perf_counter() - started)
                assert all(len(reply.outputs[0].token_ids) == tokens for reply in replies)
            rates[kind][str(tokens)] = [len(prompts) * tokens / value for value in seconds[1:]]
            print(kind, tokens, [round(rate) for rate in rates[kind][str(tokens)]], flush=True)
    Path(sys.argv[2]).write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
