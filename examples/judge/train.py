"""Rewards from a judge, in a loop of your own.

python examples/judge/train.py MODEL [--steps 3]     MODEL: a folder, such as `lockstep tiny qwen3` makes

JUDGE_BASE_URL, JUDGE_API_KEY and JUDGE_MODEL name any OpenAI-compatible server. Without them a stand-in on this machine judges:
the shorter the attempt, the better.
"""

import argparse
import asyncio
import json
import os
import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from openai import AsyncOpenAI

import lockstep as ls

QUESTIONS = ["What is rain?", "Why do cats sleep?", "Who was Ada Lovelace?", "How does bread rise?"]


class StandIn(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][-1]["content"]
        attempts = re.findall(r'<attempt number="\d+">\n(.*?)\n</attempt>', asked, re.DOTALL)
        scores = [1 / (1 + len(attempt)) for attempt in attempts]
        message = {"role": "assistant", "content": json.dumps({"scores": scores})}
        reply = {
            **{"id": "1", "object": "chat.completion", "created": 1, "model": "stand-in"},
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": len(asked), "completion_tokens": 1, "total_tokens": len(asked) + 1},
        }
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def judge(cache: Path) -> ls.Judge:
    url = os.environ.get("JUDGE_BASE_URL")
    if url is None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
    client = AsyncOpenAI(base_url=url, api_key=os.environ.get("JUDGE_API_KEY", "none"))
    return ls.Judge(client, os.environ.get("JUDGE_MODEL", "stand-in"), rubric="Prefer short answers.", cache=cache)


async def rollout(model: ls.TrainableModel, question: str) -> ls.Trajectory:
    messages = [{"role": "user", "content": question}]
    completion = await model.openai_client().chat.completions.create(
        model=model.inference_name(), messages=messages, temperature=1.0, max_tokens=24
    )
    return ls.Trajectory(messages_and_choices=[*messages, completion.choices[0]], reward=0.0)  # the judge's to give


async def main(base_model: str, steps: int, runs: str) -> None:
    model = ls.TrainableModel(
        name="judged", project="examples", base_model=base_model, lora=ls.LoraConfig(rank=8, alpha=16)
    )
    backend = ls.MegatronBackend(path=runs)
    judged = judge(Path(runs) / "judgements")
    try:
        await model.register(backend)
        while model.step < steps:
            attempts = [[rollout(model, question) for _ in range(4)] for question in QUESTIONS]
            groups = await ls.gather_trajectory_groups(attempts, after_each=judged.rank)
            result = await backend.train(model, groups, ls.TrainConfig(learning_rate=1e-3))
            print(result.step, {name: round(result.metrics[name], 4) for name in ("reward", "reply_tokens_mean")})
    finally:
        await backend.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", default=None)
    options = parser.parse_args()
    asyncio.run(main(options.model, options.steps, options.runs or tempfile.mkdtemp(prefix="judged-")))
