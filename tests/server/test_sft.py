"""`lockstep sft`, killed inside an epoch, then `lockstep train` on the same run: real parts, fp32 on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_killed_run import CONFIG, TASK, Command, wait_for

from lockstep.models.tiny.write import write_tiny
from lockstep.runs.database import read_jobs

pytestmark = [pytest.mark.server, pytest.mark.slow]
STEPS = 4
SFT = """
[sft]
data = "chats.jsonl"
batch_size = 3
epochs = 2
learning_rate = 1e-2
lr_schedule = "cosine"
warmup_steps = 1
seed = 11
"""


class Supervised(Command):
    """`lockstep sft` on five chats twice, three a step."""

    def __init__(self, folder: Path, base: Path):
        super().__init__(folder, base)
        words = ("yes", "no", "maybe", "and yes", "the answer")
        chats = [
            {"messages": [{"role": "user", "content": f"is it {n}?"}, {"role": "assistant", "content": word}]}
            for n, word in enumerate(words)
        ]
        (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        (folder / "task.py").write_text(TASK)
        (folder / "run.toml").write_text(CONFIG.format(base=base, runs=folder / "runs", steps=STEPS + 1) + SFT)


def test_sft_killed_inside_an_epoch_ends_with_the_same_bits_and_rewards_go_on(runtime, tmp_path):
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    base = write_tiny("qwen3", tmp_path / "base", seed=5, overrides=small)
    undisturbed = Supervised(tmp_path / "a", base)
    expected = undisturbed.finish(undisturbed.start("sft"), STEPS)
    assert len(set(expected.values())) == STEPS + 1
    command = Supervised(tmp_path / "b", base)
    user = command.start("sft")
    try:
        wait_for((command.run / "steps" / "0001").exists, user)  # three of the five chats of the first epoch
        user.kill()
        user.wait()
        assert command.finish(command.start("sft"), STEPS) == expected
        command.finish(command.start("train"), STEPS + 1)
    finally:
        user.kill()
    made = [job.kind for job in read_jobs(command.run) if job.state == "done" and job.kind.endswith("_step")]
    assert made == ["sft_step"] * STEPS + ["lora_step"]
    again = command.start("sft")
    assert again.wait(240) != 0
    assert "step 5 was made by rollouts" in (command.folder / "output").read_text()
