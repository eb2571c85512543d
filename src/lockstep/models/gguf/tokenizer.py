"""The tokenizer that a GGUF file describes, as Hugging Face's fast tokenizer.

A file names how text is split before merging (`tokenizer.ggml.pre`) and leaves the rule to the
reader. The rules are llama.cpp's (`src/llama-vocab.cpp`); a name without one here is refused, since
a wrong split gives wrong ids in silence. transformers 5.19 splits SmolLM2's text as GPT-2 does,
which differs where several spaces come before a digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lockstep.errors import UnsupportedModelError
from lockstep.models.gguf.file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Rule:
    """regex: how text is split; None is GPT-2's own.
    digits: each digit apart first.
    whole_words: a piece that is a token isn't merged.
    nfc: text is normalized.
    begins: texts begin with the BOS token unless the file says otherwise.
    """

    regex: str | None = None
    digits: bool = False
    whole_words: bool = False
    nfc: bool = False
    begins: bool = False


_RULES = {
    "gpt-2": _Rule(),
    "smollm": _Rule(digits=True),
    "qwen2": _Rule(regex=_LETTERS + r"\p{N}" + _REST, nfc=True),
    "llama-bpe": _Rule(regex=_LETTERS + r"\p{N}{1,3}" + _REST, whole_words=True, begins=True),
}
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(file: GgufFile) -> Any:
    """A transformers tokenizer with the file's ids, special tokens and chat template. Raises
    UnsupportedModelError.
    """
    from transformers import PreTrainedTokenizerFast

    kind, pre = file.need("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "not named")
    if kind != "gpt2" or pre not in _RULES:
        raise UnsupportedModelError(
            f"{file.path} has a tokenizer of kind {kind!r} that splits text as {pre!r}; import-gguf knows gpt2 with "
            f"{', '.join(_RULES)}"
        )
    tokens = file.need("tokenizer.ggml.tokens")
    special = {
        name: tokens[token]
        for name, key in _NAMES.items()
        if (token := file.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(file, tokens, _RULES[pre]),
        chat_template=file.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _backend(file: GgufFile, tokens: list[str], rule: _Rule) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    merges = [tuple(merge.split(" ")) for merge in file.need("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made: Any = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.regex is None))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rule.nfc:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    kinds = file.get("tokenizer.ggml.token_type", [])
    added = {kind: [t for t, k in zip(tokens, kinds, strict=False) if k == kind] for kind in (_CONTROL, _USER_DEFINED)}
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added[_CONTROL]])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in added[_USER_DEFINED]])
    first = file.get("tokenizer.ggml.bos_token_id")
    if file.get("tokenizer.ggml.add_bos_token", rule.begins) and first is not None:
        bos = (tokens[first], first)
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
        )
    return made
