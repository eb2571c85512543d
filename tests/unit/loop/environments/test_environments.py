"""Environments by name: their questions, what their scoring functions see, and what is refused before anything starts."""

# pyright: reportArgumentType=false, reportOptionalCall=false

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

from lockstep.errors import ConfigError, RolloutError
from lockstep.loop.environments.find import task_of
from lockstep.loop.run_file import TaskSection
from lockstep.rollouts.gather import gather_trajectory_groups

CHAIN_SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def section(environment: str, **options) -> TaskSection:
    return TaskSection(environment=environment, steps=1, options=options)


@pytest.fixture
def chain_sum():
    return section("reasoning_gym:chain_sum", training_questions=200, held_out_questions=50, data_set=CHAIN_SUM)


class Answering:
    """As much of a model as a rollout of questions asks, saying what it has to."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def inference_name(self) -> str:
        return "m@0"

    def openai_client(self):
        async def create(**request):
            from openai.types.chat.chat_completion import Choice

            self.asked.append(request)
            message = {"role": "assistant", "content": self.say(request["messages"][-1]["content"])}
            return SimpleNamespace(choices=[Choice(index=0, finish_reason="stop", message=message)])

        return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


async def rewards(task, model) -> list[float]:
    return [(await task.rollout(model, scenario, 1.0)).reward for scenario in task.scenarios[:8]]


async def test_a_data_set_is_scored_by_its_own_function(chain_sum, tmp_path):
    task = task_of(chain_sum, tmp_path)
    answers = {question.messages[-1]["content"]: question.data["answer"] for question in task.scenarios}
    right = Answering(lambda asked: f"It is 1. <answer>{answers[asked]}</answer>")
    assert await rewards(task, right) == [1.0] * 8
    assert max(await rewards(task, Answering(lambda asked: "<answer>x</answer>"))) < 0.1
    assert await rewards(task, Answering(lambda asked: answers[asked])) == [0.0] * 8  # not where it was asked for
    system = right.asked[0]["messages"][0]
    assert (system["role"], "<answer>" in system["content"]) == ("system", True)


def test_what_is_held_out_is_never_trained_on_and_a_seed_decides_both(chain_sum, tmp_path):
    task, again = task_of(chain_sum, tmp_path), task_of(chain_sum, tmp_path)
    other = task_of(chain_sum.model_copy(update={"seed": 7}), tmp_path)
    texts = [question.messages[-1]["content"] for question in task.scenarios]
    held_out = {question.messages[-1]["content"] for question in task.evaluation_scenarios}
    assert held_out
    assert not held_out & set(texts)
    assert task.scenarios == again.scenarios
    assert task.scenarios != other.scenarios
    shown = task.demonstrations(random.Random(0))
    right = {question.messages[-1]["content"]: question.shown for question in task.scenarios}
    share = sum(each["messages"][-1]["content"] == right[each["messages"][-2]["content"]] for each in shown) / len(
        shown
    )
    assert 0.35 < share < 0.75


ROWS = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(6)]
SCORE = """
def score(text, row):
    if text == "crash":
        raise RuntimeError("the scorer broke on " + row["prompt"])
    return text == row["answer"]

async def later(text, row):
    return None if text == "crash" else 0.5
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "scorer.py").write_text(SCORE)
    return tmp_path


async def test_a_file_is_scored_by_the_users_function(folder):
    task = task_of(section("jsonl:rows.jsonl", score="scorer.py:score", held_out=2, system_prompt="Add."), folder)
    assert [question.data for question in task.scenarios] == ROWS[:4]
    assert [question.data for question in task.evaluation_scenarios] == ROWS[4:]
    model = Answering(lambda asked: str(int(asked.split()[2]) + 1))
    assert await rewards(task, model) == [1.0] * 4
    assert model.asked[0]["messages"] == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": ROWS[0]["prompt"]},
    ]
    later = task_of(section("jsonl:rows.jsonl", score="scorer:later"), folder)
    assert await rewards(later, model) == [0.5] * 6


@pytest.mark.parametrize(
    ("score", "text"), [("score", "the scorer broke on What is"), ("later", "returned None, which is no number")]
)
async def test_a_scoring_function_that_raises_is_a_failed_rollout_with_its_traceback(folder, score, text):
    task = task_of(section("jsonl:rows.jsonl", score=f"scorer.py:{score}"), folder)
    model = Answering(lambda asked: "crash" if " 1 " in asked else "1")
    attempts = [[task.rollout(model, scenario, 1.0) for scenario in task.scenarios]]
    (group,) = await gather_trajectory_groups(attempts, max_exceptions=1, progress=False)
    assert len(group.trajectories) == 5
    (failure,) = group.exceptions
    assert text in failure.message
    assert "scorer.py" in failure.traceback or "questions.py" in failure.traceback
    with pytest.raises(RolloutError, match=text):
        await gather_trajectory_groups(
            [[task.rollout(model, task.scenarios[1], 1.0)]], max_exceptions=0, progress=False
        )


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ("reasoning_gym:chain_some", {}, "chain_sum"),
        ("reasoning_gym:chain_sum", {"reply_token": 3}, r"\[task.options\] has no setting 'reply_token'"),
        (
            "reasoning_gym:chain_sum",
            {"data_set": {"min_term": 3}},
            "data_set: reasoning_gym:chain_sum refuses it.*min_term",
        ),
        ("reasoning_gym:chain_sum", {"prompt_style": "defalt"}, "default"),
        (
            "reasoning_gym:chain_sum",
            {
                "data_set": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
                "held_out_questions": 5000,
            },
            "draws the same questions",
        ),
        ("jsonl:none.jsonl", {"score": "scorer.py:score"}, "none.jsonl does not exist"),
        ("jsonl:rows.jsonl", {}, "score"),
        ("jsonl:rows.jsonl", {"score": "scorer.py"}, "FILE.py:NAME"),
        ("jsonl:rows.jsonl", {"score": "scorer.py:scores"}, "has no function scores"),
        ("jsonl:rows.jsonl", {"score": "nothing.py:score"}, "scoring file .*nothing.py does not exist"),
        ("jsonl:rows.jsonl", {"score": "scorer.py:score", "held_out": 6}, "none is left"),
        ("jsonl:bad.jsonl", {"score": "scorer.py:score"}, "bad.jsonl, line 2 has no question"),
        ("gym:chain_sum", {}, "use one of reasoning_gym:NAME, jsonl:NAME, verifiers:NAME"),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(folder, environment, options, message):
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(ConfigError, match=message):
        task_of(section(environment, **options), folder)


def test_a_task_is_a_file_or_an_environment():
    for given in ({}, {"file": "a.py", "environment": "jsonl:b"}, {"file": "a.py", "options": {"a": 1}}):
        with pytest.raises(ConfigError, match=r"set file|set environment"):
            TaskSection(steps=1, **given)
