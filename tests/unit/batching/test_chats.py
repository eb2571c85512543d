"""Chats to tokens: loss on assistant turns only, the server's own prompts, and bad rows by line.

Shape suffix: S tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from chat_templates import TEMPLATES
from lockstep.batching.chats import Chat, ChatFormat, chat_sequences, read_chats, tokenize_chats
from lockstep.batching.supervised import drawn_rows, prepare_supervised, steps_of
from lockstep.config.sft import SFTConfig
from lockstep.errors import DataError
from lockstep.models.tiny.tokenizer import save_tokenizer

QUESTION = {"role": "user", "content": "is it?"}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": 3}'}}
CHAT = [
    {"role": "system", "content": "short answers"},
    QUESTION,
    {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nyes"},
    {"role": "user", "content": "and that?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "c"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nno"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def form(tokenizer: Any, template: str | None = None) -> ChatFormat:
    return ChatFormat(tokenizer, frozenset({tokenizer.eos_token_id}), template)


def learned(tokenizer: Any, sequence: Any) -> str:
    return tokenizer.decode(sequence.tokens_S[sequence.loss_mask_S])


@pytest.mark.parametrize("template", [None, *sorted(TEMPLATES)])
def test_loss_lies_on_each_turn_once_behind_the_prompt_that_the_server_would_render(tokenizer, template):
    shape = form(tokenizer, template and TEMPLATES[template])
    sequences = chat_sequences(Chat("c", CHAT), shape, "all")
    learned_turns = [text for sequence in sequences for text in learned(tokenizer, sequence).split("<|im_end|>")[:-1]]
    assert len(learned_turns) == 3
    assert sum(sequence.scored for sequence in sequences) == sum(
        len(tokenizer(t + "<|im_end|>")["input_ids"]) for t in learned_turns
    )
    for turn, part in zip(learned_turns, ("yes", "look", "no"), strict=True):
        assert part in turn
    for index in (2, 4, 6):  # the turn's prompt, as the server renders it, begins a sequence
        prompt = shape.ids(shape.text(CHAT[:index], None, prompt=True))
        assert any(sequence.tokens_S[: len(prompt)].tolist() == prompt.tolist() for sequence in sequences)
    assert all(sequence.tokens_S[-1] == tokenizer.eos_token_id for sequence in sequences)  # not the newline after
    if template is None:
        assert len(sequences) == 1  # nothing is rewritten
    if template == "thinking_dropped":
        assert len(sequences) > 1  # the first thinking is gone from what the last turns see
    [last] = chat_sequences(Chat("c", CHAT), shape, "last")
    assert learned(tokenizer, last) == learned_turns[-1] + "<|im_end|>"


def test_bad_rows_are_reported_by_line(tokenizer, tmp_path):
    rows = [
        {"messages": [QUESTION, {"role": "assistant", "content": "yes"}]},
        {"messages": [QUESTION]},
        {"prompt": "is it?"},
        {"messages": [QUESTION, {"role": "assistant", "content": ""}]},
        {"messages": [QUESTION, {"role": "assistant", "content": "yes " * 200}]},
        {"messages": [{"content": "?"}, {"role": "assistant", "content": "yes"}]},
        {"messages": [QUESTION, {"role": "assistant", "content": 5}]},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n{\n")
    chats = read_chats(file, form(tokenizer), "all", longest=100)
    assert len(chats.rows) == len(chats.raw) == 1
    expected = {
        2: "no message of an assistant",
        3: 'expected {"messages"',
        4: "the turn is empty",
        5: "tokens, the limit is 100",
        6: "each message needs a role",
        7: "has no text as its content",
        9: "no JSON",
    }
    assert [int(line.split(":")[0].split(",")[0].removeprefix("line ")) for line in chats.refused] == list(expected)
    for refused, part in zip(chats.refused, expected.values(), strict=True):
        assert part in refused
    with pytest.raises(DataError, match=r"chats\.jsonl: 7 of 8 rows can't be trained on: line 2: no message"):
        chats.check(False, str(file))
    chats.check(True, str(file))
    with pytest.raises(DataError, match="has no row to train on"):
        tokenize_chats([{}], form(tokenizer), "all", 100).check(True, "the batch")
    with pytest.raises(DataError, match="can't be read"):
        read_chats(tmp_path / "none", form(tokenizer), "all", 100)


def test_turns_that_can_not_be_masked_are_refused(tokenizer):
    chat = Chat("c", [QUESTION, {"role": "assistant", "content": "yes"}])
    backwards = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}{{ 'A' if add_generation_prompt }}"
    with pytest.raises(DataError, match="c, message 1: the chat template does not begin the turn with its own prompt"):
        chat_sequences(chat, form(tokenizer, backwards), "all")
    with pytest.raises(DataError, match=r"c, message 1: the chat template can't render it: .*nothing"):
        chat_sequences(chat, form(tokenizer, "{{ messages[0].nothing.at_all }}"), "all")


def test_prompt_and_turn_are_tokenized_apart(tokenizer):
    """ "yes" is one token of the tiny tokenizer, but no server that was asked "ye" samples it."""
    glued = form(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    [sequence] = chat_sequences(
        Chat("c", [{"role": "user", "content": "ye"}, {"role": "assistant", "content": "s"}]), glued, "all"
    )
    assert sequence.tokens_S.tolist() == [*glued.ids("ye"), *glued.ids("s")] != glued.ids("yes").tolist()
    assert learned(tokenizer, sequence) == "s"


def test_every_chat_once_per_epoch_wherever_a_run_resumes():
    rows, size, epochs = 10, 4, 2.5
    assert steps_of(rows, size, epochs) == 7
    drawn = [drawn_rows(rows, size, epochs, seed=3, step=step) for step in range(1, 8)]
    flat = [row for batch in drawn for row in batch]
    assert [len(batch) for batch in drawn] == [4, 4, 4, 4, 4, 4, 1]
    assert Counter(flat[:10]) == Counter(flat[10:20]) == Counter(range(10))
    assert flat[:10] != flat[10:20]
    assert drawn[4] == drawn_rows(rows, size, epochs, seed=3, step=5)  # of its number alone
    assert drawn != [drawn_rows(rows, size, epochs, seed=4, step=step) for step in range(1, 8)]


def test_a_batch_shares_prefixes_and_counts_every_learned_token_once(tokenizer):
    chats = tokenize_chats([{"messages": CHAT}] * 3, form(tokenizer, TEMPLATES["thinking_dropped"]), "all", 10_000)
    prepared = prepare_supervised(chats.rows, step=0, config=SFTConfig())
    scored = sum(sequence.scored for row in chats.rows for sequence in row)
    assert prepared.batch.scored_offsets_Q[-1] == scored
    assert prepared.metrics["chats"] == 3
    assert prepared.metrics["shared_share"] > 0.6
