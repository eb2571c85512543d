"""The arithmetic example: what it asks, what it holds out, what it pays."""

import sys

import pytest

from lockstep.cli.quickstart.examples import examples_folder
from lockstep.cli.quickstart.real import Replies
from lockstep.errors import ConfigError
from lockstep.loop.run_file import load_run_file
from lockstep.loop.task import load_task

FOLDER = examples_folder() / "arithmetic"


@pytest.fixture(scope="module")
def task():
    return load_task(FOLDER / "task.py")


def test_held_out_questions_are_never_trained_on(task):
    trained, held_out = set(task.scenarios), set(task.evaluation_scenarios)
    assert len(held_out) == len(task.evaluation_scenarios) >= 64
    assert len(trained) > 500
    assert not trained & held_out
    assert len({question.answer for question in held_out}) > 40
    section = load_run_file(FOLDER / "config.toml").task
    drawn = [question for step in range(section.steps) for question in task.draw(section.groups_per_step, 3, step)]
    assert not held_out & set(drawn)


@pytest.mark.parametrize(
    ("reply", "answer", "earned"),
    [
        ("5 - 9 = -4.", "-4", 1.0),
        ("5 - 9 = 4", "-4", 0.0),
        ("The answer is 1,000.", "1000", 1.0),
        ("14 - or so", "14", 1.0),
        ("7 and not 8", "7", 0.0),
        ("It is −3", "-3", 1.0),
        ("", "0", 0.0),
        (None, "0", 0.0),
    ],
)
def test_the_last_number_is_what_counts(task, reply, answer, earned):
    assert sys.modules["lockstep_task_task"].reward(reply, answer) == earned


def test_without_its_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install lockstep-rl\[examples\]"):
        load_task(FOLDER / "task.py")


def test_replies_that_were_learned_are_shown_first():
    replies = Replies()
    replies.by_step[0] = {"a": ("1", 1.0), "b": ("2", 0.0), "c": ("3", 0.0)}
    replies.by_step[4] = {"a": ("1", 1.0), "b": ("4", 1.0), "c": ("9", 0.0)}
    assert replies.changed()[0] == ("b", "2", "4")
    assert len(replies.changed()) == 3
