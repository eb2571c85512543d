"""tokenizer_and_template on the families' own chat templates, and Qwen3.8's, which is new in what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lockstep.models.registry import get_model_support_spec
from lockstep.models.tiny.tokenizer import save_tokenizer
from lockstep.validate.faults.file_faults import thinking_dropped, wrong_eos
from lockstep.validate.stages.files import tokenizer_and_template as stage
from rendering import REAL_TEMPLATES, template_of, with_role_tokens


class Bench:
    """A tokenizer with a family's template, on both sides."""

    def __init__(self, folder: Path, name: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = with_role_tokens(AutoTokenizer.from_pretrained(folder))
        self.tokenizer.chat_template = template_of(name)
        if name.startswith("llama"):
            self.tokenizer.eos_token = "<|eot_id|>"
        self.templates = (self.tokenizer.chat_template,) * 2

    def wrong(self) -> list[str]:
        rows = max(self.tokenizer.get_vocab().values()) + 1
        return [figure.name for figure in stage.measure(self.tokenizer, self.templates, rows, ()) if not figure.ok]

    def prompt(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return stage.render(self.tokenizer, messages, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.mark.parametrize("name", REAL_TEMPLATES)
def test_a_release_passes_and_its_faults_are_seen(folder: Path, name: str) -> None:
    bench = Bench(folder, name)
    assert not bench.wrong()
    with wrong_eos(bench):  # pyright: ignore[reportArgumentType]
        assert bench.wrong()
    with thinking_dropped(bench):  # pyright: ignore[reportArgumentType]
        assert bench.wrong() == ["scenes that trainer and server render differently"]
    drops = name == "qwen3" or name.startswith(("qwen3_5", "qwen3_6"))
    assert stage.keeps_reasoning(bench.tokenizer) is not drops


ASKED = [{"role": "user", "content": "40 + 2?"}]
EFFORTS = {"xhigh": "Reasoning effort is set to xhigh.", "medium": None, "low": "Reasoning effort is set to low."}


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_qwen3_8_writes_its_effort_into_the_system_message(folder: Path, effort: str, system: str | None) -> None:
    messages = [*([{"role": "system", "content": system}] if system is not None else []), *ASKED]
    prompt = Bench(folder, "qwen3_8").prompt(messages, reasoning_effort=effort)
    sentence = EFFORTS[effort]
    assert (sentence is None) == ("Reasoning effort" not in prompt)
    assert sentence is None or f"<|im_start|>system\n{sentence}" in prompt
    assert prompt.count("<|im_start|>system") == int(bool(sentence or system))
    assert (system or "") in prompt
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")


def test_qwen3_8_thinks_hardest_unless_told_and_refuses_what_it_does_not_know(folder: Path) -> None:
    bench = Bench(folder, "qwen3_8")
    assert bench.prompt(ASKED) == bench.prompt(ASKED, reasoning_effort="xhigh")
    assert "Reasoning effort" not in bench.prompt(ASKED, enable_thinking=False)
    with pytest.raises(Exception, match="Unexpected reasoning effort high"):
        bench.prompt(ASKED, reasoning_effort="high")


def test_qwen3_8_keeps_thinking_in_the_history_and_qwen3_6_drops_it(folder: Path) -> None:
    reply = {"role": "assistant", "content": "42", "reasoning_content": "forty and two"}
    history = [*ASKED, reply, {"role": "user", "content": "Sure?"}]
    new, old = (Bench(folder, name) for name in ("qwen3_8", "qwen3_6"))
    assert "<think>\nforty and two\n</think>\n\n42" in new.prompt(history)
    assert "forty and two" not in old.prompt(history)
    assert "forty and two" not in new.prompt(history, preserve_thinking=False)
    said = new.prompt(ASKED) + "forty and two\n</think>\n\n42"
    assert new.prompt(history).startswith(said), "a history continues what was sampled"


def test_qwen3_8_is_known_by_name() -> None:
    spec = get_model_support_spec("Qwen/Qwen3.8-27B")
    assert (spec.key, spec) == ("qwen3_5", get_model_support_spec("Qwen/Qwen3.6-27B"))
