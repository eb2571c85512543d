"""Tool-call and reasoning parsers: what vLLM would die of is known from the tokenizer's files, before anything starts."""

from __future__ import annotations

import ast
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import lockstep as ls
from lockstep.errors import ConfigError
from lockstep.inference.parsers import REASONING_PARSERS, TOOL_PARSERS, UNSERVED, check_reasoning, resolve_tool_calls
from lockstep.inference.tokenizer_files import argument, read_tokenizer
from lockstep.inference.vllm_options import OPTIONS, unknown_option
from lockstep.models.registry import get_model_support_spec_by_key
from lockstep.models.tiny.write import write_tiny
from nothing_started import refused_at_once

PYTHON_TAG = "<|python_tag|>"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama by its architecture, with ChatML and without Llama 3's tokens, as SmolLM2 is."""
    return write_tiny("llama3", tmp_path_factory.mktemp("models") / "llama", seed=random.randrange(1000))


def with_tokens(model: Path, folder: Path, *tokens: str) -> Path:
    """A copy of the tokenizer's files with further tokens in its vocabulary."""
    shutil.copytree(model, folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    size = len(stored["model"]["vocab"])
    stored["added_tokens"] += [
        stored["added_tokens"][0] | {"id": size + n, "content": token} for n, token in enumerate(tokens)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


def resolved(model: Path, asked=None, server_args=()):
    family = get_model_support_spec_by_key("llama3").tool_call_parser
    return resolve_tool_calls(asked, family, read_tokenizer(model, server_args), server_args)


def test_the_familys_parser_only_where_the_tokenizer_serves_it(llama, tmp_path):
    off = resolved(llama)
    assert off.parser is None
    assert PYTHON_TAG in off.off
    assert "set tool_call_parser" in off.off
    assert resolved(with_tokens(llama, tmp_path / "tagged", PYTHON_TAG)).parser == "llama3_json"
    assert resolved(llama, "hermes").parser == "hermes"
    assert resolved(llama, server_args=("--tool-call-parser=hermes",)).parser == "hermes"


def test_a_template_without_tools_switches_them_off(llama, tmp_path):
    """vLLM would read calls of tools that the model was never shown. Asked for by name it does."""
    folder = with_tokens(llama, tmp_path / "tagged", PYTHON_TAG)
    template = tmp_path / "plain.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    args = ("--chat-template", str(template))
    assert "does not write tools" in resolved(folder, server_args=args).off
    named = resolved(folder, "llama3_json", server_args=args)
    assert named.parser == "llama3_json"
    assert "does not show" in named.note


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tool_call_parser": "llama3_json"}, r"tool_call_parser = 'llama3_json' can't work .* needs <\|python_tag\|>"),
        ({"tool_call_parser": "hermess"}, "'hermess' is no parser of vLLM's: choose hermes"),
        ({"tool_call_parser": "cohere_command4"}, "cohere_melody"),
        (
            {"server_args": ("--tool-call-parser", "mistral")},
            r"server_args: --tool-call-parser = 'mistral' .*TOOL_CALLS",
        ),
        (
            {"server_args": ("--reasoning-parser=deepseek_r1",)},
            "--reasoning-parser = 'deepseek_r1' .* <think> and </think>",
        ),
        ({"server_args": ("--reasoning_parser", "qwen_3")}, "no parser of vLLM's: choose qwen3"),
    ],
)
async def test_an_explicit_parser_that_cannot_work_is_refused_before_anything_starts(llama, tmp_path, settings, says):
    model = ls.TrainableModel(name="m", project="p", base_model=str(llama))
    with refused_at_once(says):
        await model.register(ls.MegatronBackend(path=tmp_path, **settings))


def test_every_spelling_of_an_argument_is_read():
    args = ("--tool_call_parser", "a", "--x", "--tool-call-parser=b", "--reasoning-parser", "c")
    assert argument(args, "tool-call-parser") == "b"
    assert argument(args, "reasoning-parser") == "c"
    assert argument(args, "tokenizer") is None


def test_the_tables_name_every_parser_that_vllm_has(runtime):
    (package,) = runtime.python.parents[1].glob("lib/python*/site-packages/vllm")
    for folder, variable, known in (
        ("tool_parsers", "_TOOL_PARSERS_TO_REGISTER", TOOL_PARSERS),
        ("reasoning", "_REASONING_PARSERS_TO_REGISTER", REASONING_PARSERS),
    ):
        tree = ast.parse((package / folder / "__init__.py").read_text())
        (table,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == variable]
        assert {key.value for key in table.keys} == {*known, *UNSERVED}


def test_the_list_of_options_is_vllms(runtime):
    """Literal options, and the fields that become options; so a release with another option fails here."""
    (package,) = runtime.python.parents[1].glob("lib/python*/site-packages/vllm")
    names = set()
    for file in ("engine/arg_utils.py", "entrypoints/launchers/cli_args.py"):
        for node in ast.walk(ast.parse((package / file).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                literals = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                names |= {text.removeprefix("--") for text in literals if text.startswith("--")}
            elif isinstance(node, ast.ClassDef) and "Frontend" in node.name:
                fields = [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
                names |= {field.replace("_", "-") for field in fields}
    assert names == OPTIONS
    assert (
        unknown_option(("--no-enable-prefix-caching", "--hf_overrides.a", "1", "-tp", "2", "--max-num-seqs=3")) is None
    )


ASK = """
import json, sys
from vllm.parser.parser_manager import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import get_tokenizer
from vllm.tool_parsers import ToolParserManager

def works(tokenizer, **names):
    try:
        ParserManager.get_parser(enable_auto_tools=True, model_name="m", tokenizer=tokenizer, **names)
    except Exception:
        return False
    return True

answers = []
for folder in sys.argv[1:]:
    tokenizer = get_tokenizer(folder)
    tools = {name: works(tokenizer, tool_parser_name=name) for name in ToolParserManager.list_registered()}
    thinks = {name: works(tokenizer, reasoning_parser_name=name) for name in ReasoningParserManager.list_registered()}
    answers.append([tools, thinks])
print("ANSWERS", json.dumps(answers))
"""


@pytest.mark.slow
@pytest.mark.server
def test_vllm_itself_says_the_same_of_every_parser(runtime, llama, tmp_path):
    """Of a tokenizer without any of the tokens, of one with all, and of one that lacks one of each parser's tokens."""
    needed = sorted({token for table in (TOOL_PARSERS, REASONING_PARSERS) for need in table.values() for token in need})
    last = {need[-1] for table in (TOOL_PARSERS, REASONING_PARSERS) for need in table.values() if need}
    folders = [
        llama,
        with_tokens(llama, tmp_path / "all", *needed),
        with_tokens(llama, tmp_path / "some", *(token for token in needed if token not in last)),
    ]
    environment = {"PYTHONPATH": str(runtime.plugin_path), "VLLM_NO_USAGE_STATS": "1", "HOME": str(tmp_path)}
    reply = subprocess.run(
        [runtime.python, "-c", ASK, *folders], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    lines = [line for line in reply.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, reply.stderr[-2000:]
    for folder, (tools, thinks) in zip(folders, json.loads(lines[0].removeprefix("ANSWERS")), strict=True):
        tokenizer = read_tokenizer(folder)
        assert {name: works_here(resolve_tool_calls, name, "", tokenizer) for name in tools} == tools
        assert {name: works_here(check_reasoning, tokenizer, ("--reasoning-parser", name)) for name in thinks} == thinks


def works_here(check, *arguments) -> bool:
    try:
        check(*arguments)
    except ConfigError:
        return False
    return True
