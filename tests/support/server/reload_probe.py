"""Run by the server's own Python: scores tokens before and after a stock reload, without and then with our fixes.

Arguments: old checkpoint, new checkpoint, tokens as JSON. Prints one line of JSON with the logprobs.
"""

import json
import os
import sys


class Extension:
    """Added to vLLM's worker class."""

    def apply_fixes(self):
        from lockstep_vllm.patches import cpu_reload

        os.environ.pop(cpu_reload.LEFT_OUT_VARIABLE)
        cpu_reload.apply()


def score(llm, tokens):
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    output = llm.generate([TokensPrompt(prompt_token_ids=tokens)], params, use_tqdm=False)[0]
    return [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]


def main(old, new, tokens):
    from vllm import LLM

    llm = LLM(
        old,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=64 << 20,
        worker_extension_cls="reload_probe.Extension",
    )
    scores = {"before": score(llm, tokens)}
    for name in ("without", "with"):
        if name == "with":
            llm.collective_rpc("apply_fixes")
        llm.collective_rpc("reload_weights", kwargs={"weights_path": new})
        llm.reset_prefix_cache()
        scores[name] = score(llm, tokens)
    sys.stdout.write("RESULT " + json.dumps(scores) + "\n")
    sys.stdout.flush()
    llm.llm_engine.engine_core.shutdown()
    # On a busy machine Python's own end aborts in one of 14 runs, in vLLM's libraries ("terminate called without an active exception").
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
