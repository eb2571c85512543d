"""A file that `lockstep sft` and `lockstep train` share is checked as a whole."""

from __future__ import annotations

import pytest

from lockstep.errors import ConfigError
from lockstep.loop.run_file import load_sft_file

SFT = '[model]\nname = "m"\nproject = "p"\nbase_model = "b"\n[sft]\ndata = "chats.jsonl"\n'
TASK = '[task]\nfile = "task.py"\nsteps = 3\nseed = 7\n'


def loaded(tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_text(text)
    return load_sft_file(file)


def test_the_sections_of_train_may_stand_beside_its_own(tmp_path):
    assert loaded(tmp_path, SFT + TASK + "[train]\nminibatches = 2\n").seed == 7


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("[train]\nminibatches = 2\n", r"train has no effect without \[task\]"),
        ("[tiny]\nwarmup_steps = 2\n", r"tiny has no effect without \[task\]"),
        (TASK + "[train]\nminibatch = 2\n", "minibatch"),
        (TASK + "[pipeline]\nwindow = 2\n", "mode = pipeline"),
        ("[trian]\nminibatches = 2\n", "trian"),
    ],
)
def test_a_section_without_effect_is_refused(tmp_path, more, named):
    with pytest.raises(ConfigError, match=named):
        loaded(tmp_path, SFT + more)
