"""A judge's scores: the right attempt gets the right score, whatever the order, and no reward is made up."""

# pyright: reportArgumentType=false

from __future__ import annotations

import re

import pytest

import lockstep as ls
from judge_service import Server, attempt, by_length
from lockstep.rollouts.gather import gather_trajectory_groups


async def test_attempts_get_their_own_scores_in_whatever_order_they_are_shown(tmp_path):
    server = Server(by_length)
    judge = ls.Judge(server.client, "j", cache=tmp_path / "cache")
    texts = ["apple", "a red apple", "fig", "an even longer answer", "fig"]
    group = ls.TrajectoryGroup(trajectories=[attempt(text) for text in texts])
    ranked = await judge.rank(group)
    assert [each.reward for each in ranked.trajectories] == [len(text) / 100 for text in texts]
    assert [each.metrics["judge_tokens"] for each in ranked.trajectories] == [20.0] * 5
    shown = re.findall(r'<attempt number="\d+">\n(.*?)\n</attempt>', server.asked[0][1]["content"], re.DOTALL)
    assert sorted(shown) == sorted(texts)
    assert shown != texts
    assert server.asked[0][1]["content"].count("Name a fruit.") == 1
    again = await judge.rank(ls.TrajectoryGroup(trajectories=group.trajectories[::-1]))
    assert [each.reward for each in again.trajectories] == [each.reward for each in ranked.trajectories[::-1]]
    assert again.trajectories[0].metrics["judge_tokens"] == 0.0
    assert len(server.asked) == 1


async def test_a_judge_sees_what_the_model_said_and_no_answer_of_a_tool():
    server = Server(by_length)
    group = ls.TrajectoryGroup(trajectories=[attempt("7", tool="The answer is 7"), attempt("8")])
    await ls.Judge(server.client, "j").rank(group)
    assert "The answer is 7" not in server.asked[0][1]["content"]
    assert "[calls look({})]" in server.asked[0][1]["content"]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("I like the first.", "has no scores"),
        ('{"scores": [1]}', r"gave \[1\] for 2 attempts"),
        ('{"scores": [1, 7]}', "from 0 to 1"),
        ('{"scores": [true, 0]}', "from 0 to 1"),
    ],
)
async def test_an_answer_that_is_no_judgement_is_asked_for_again_and_then_fails_the_group(bad, problem):
    answers = iter([bad, '{"scores": [0.25, 0.75]}'])
    server = Server(lambda _: next(answers))
    group = ls.TrajectoryGroup(trajectories=[attempt("a"), attempt("b")])
    ranked = await ls.Judge(server.client, "j").rank(group)
    assert sorted(each.reward for each in ranked.trajectories) == [0.25, 0.75]
    assert re.search(problem, server.asked[1][-1]["content"])
    failing = ls.Judge(Server(lambda _: bad).client, "j", tries=2)

    async def rollout(text):
        return attempt(text)

    (failed,) = await gather_trajectory_groups(
        [[rollout("a"), rollout("b")]], after_each=failing.rank, max_exceptions=0, progress=False
    )
    assert failed.trajectories == []
    assert len(failed.exceptions) == 2
    assert re.search(problem, failed.exceptions[0].message)


async def test_a_judge_that_is_gone_fails_the_group_and_one_attempt_needs_none():
    server = Server(lambda _: 1 / 0)
    judge = ls.Judge(server.client, "j")
    ranked = await judge.rank(ls.TrajectoryGroup(trajectories=[attempt("a"), attempt("b")]))
    assert (ranked.trajectories, len(ranked.exceptions)) == ([], 2)
    lone = ls.TrajectoryGroup(trajectories=[attempt("a")])
    assert await judge.rank(lone) is lone
