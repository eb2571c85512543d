"""The command line: bad input gets one line and a non-zero exit; what it writes is what it says."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.numpy import save_file

from lockstep.backends.megatron import launch
from lockstep.cli.chat import chat_with
from lockstep.cli.main import main
from lockstep.cli.quickstart.tiny import _say_what_is_deleted
from lockstep.cli.score import _sequences, read_lines
from lockstep.cli.tables.live_table import LiveTable
from lockstep.config.megatron import MegatronConfig
from lockstep.config.train import TrainConfig
from lockstep.errors import DataError, ServerError, StoreError, TrainerError
from lockstep.loop.run_file import TaskSection, load_run_file
from lockstep.loop.synchronous import StepSummary
from lockstep.models.registry import list_model_support_specs
from lockstep.models.tiny.write import write_tiny
from lockstep.process.owned_lock import take
from lockstep.runs.store import RunStore
from lockstep.trainer.client import Trainer
from lockstep.trainer.protocol import EngineConfig, LoraSettings
from lockstep.validate.summary import table as report_table
from nothing_started import refused_at_once

TASK = """
def scenarios():
    return ["hi"]


async def rollout(model, scenario, temperature):
    raise RuntimeError("never reached")
"""


def lockstep(*arguments, cwd=None, columns=200):
    command = [sys.executable, "-m", "lockstep.cli.main", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment, check=False)


def here(*arguments, cwd):
    """`lockstep` in this process: what a command says before it starts anything, without the seconds of another interpreter."""
    said, failed, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(failed):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["lockstep", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), failed.getvalue())


def run_file(folder: Path, model="", task="", train="", task_code=TASK) -> Path:
    (folder / "task.py").write_text(task_code)
    config = folder / "run.toml"
    base = model or 'base_model = "Nobody/NoSuchModel-7B"'
    config.write_text(
        f'[model]\nname = "m"\nproject = "p"\n{base}\n[task]\nfile = "task.py"\nsteps = 1\n{task}\n[train]\n{train}\n'
    )
    return config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "Nobody/NoSuchModel-7B"),
        ({"train": "learning_rat = 1e-3"}, "did you mean learning_rate"),
        ({"train": "learning_rate = -1"}, "learning_rate"),
        ({"train": "kl_reference_step = 2"}, "kl_coef"),
        ({"task": "group_size = 1"}, "group_size"),
        ({"model": 'base_model = "x"\nlora = { rank = 7 }'}, "rank"),
        ({"task_code": "def scenarios():\n    return []\n" + TASK.split("\n\n\n")[1]}, "nothing to roll out"),
        ({"task_code": "def scenarios():\n    return [1]\n"}, "async def rollout"),
        ({"task_code": TASK.replace("scenario, temperature", "scenario")}, "async def rollout(model, scenario"),
        ({"task_code": TASK.replace('return ["hi"]', "print()")}, "scenarios() returned NoneType"),
        (
            {"task_code": TASK + "\n\ndef evaluation_scenarios():\n    return []\n"},
            "evaluation_scenarios() returned an empty",
        ),
        ({"train": "[tiny.train]\nlearning_rat = 1e-3"}, "did you mean learning_rate"),
        ({"train": '[tiny]\nfamily = "qwen9"'}, "must be one of llama3, qwen3"),
    ],
)
def test_a_bad_run_file_gets_one_line(tmp_path, change, says):
    run = here if change else lockstep
    result = run("train", run_file(tmp_path, **change), cwd=tmp_path)
    assert result.returncode not in (0, 1) or "error:" in result.stderr
    assert result.returncode != 0
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "runs").exists()


def test_a_missing_run_file_is_named(tmp_path):
    result = lockstep("train", tmp_path / "none.toml")
    assert result.returncode == 2
    assert "none.toml does not exist" in result.stderr


def test_help_names_every_command():
    result = lockstep("--help")
    assert result.returncode == 0
    for command in ("quickstart", "train", "chat", "score", "models", "tiny", "runtime"):
        assert command in result.stdout


def test_models_lists_every_family_and_breaks_no_name():
    result = lockstep("models", columns=80)
    assert result.returncode == 0
    words = {word.strip(":,") for word in result.stdout.split()}
    for spec in list_model_support_specs():
        assert {spec.key, *spec.model_names} <= words


def test_the_live_table_fits_a_terminal():
    screen = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with LiveTable(screen, "m on base") as table:
        table(StepSummary(1234, 0.812, 0.9, -0.0123, 1.2e-3, 3e-6, rollout_s=1012.3, train_s=2101.2, sync_s=3456.7))
    shown = screen.file.getvalue()
    assert "sync s" in shown
    assert "3456.7" in shown


def test_tiny_and_score_agree_with_hugging_face(tmp_path):
    """A fresh random model and random tokens: `score` gives Hugging Face's log-probabilities, packed or not."""
    seed = int(np.random.default_rng().integers(1 << 30))
    rng = np.random.default_rng(seed)
    folder = tmp_path / "model"
    result = lockstep("tiny", "qwen3", folder, "--seed", seed % 1000, "--set", "num_hidden_layers=3")
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    prompt = rng.integers(0, 300, 12).tolist()
    lines = [{"id": f"s{k}", "tokens": prompt + rng.integers(0, 300, 3 + k).tolist()} for k in range(4)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out.jsonl"
    result = lockstep("score", folder, "--input", tmp_path / "in.jsonl", "--output", out, "--packed")
    assert result.returncode == 0, result.stderr
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for line, text in zip(lines, out.read_text().splitlines(), strict=True):
        line_out = json.loads(text)
        ids = torch.tensor([line["tokens"]])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert line_out["id"] == line["id"]
        np.testing.assert_allclose(line_out["logprobs"], logprobs.numpy(), atol=2e-5, err_msg=f"seed {seed}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"id": "a", "tokens": [1]}', "tokens"),
        ('{"id": "a", "tokens": [1, 2], "more": 1}', "more"),
        ('{"id": "a", "tokens": [1, 2]}\n{"id": "a", "tokens": [1, 2]}', "twice"),
        ("[1]", "line 1"),
        ("", "empty"),
        ('{"id": "a", "tokens": [1, 99999]}', "99999"),
        ('{"id": "a", "tokens": [1, 2], "routed_experts": [[[0]], [[0]]]}', "the model has no experts"),
    ],
)
def test_bad_score_input_is_named(tmp_path, tiny_qwen3, text, says):
    (tmp_path / "in.jsonl").write_text(text)
    places = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    result = here("score", tiny_qwen3, *places, cwd=tmp_path)
    assert result.returncode == 1
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def one_line(result, says: str, code: int) -> None:
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (("score", "{model}", "--input", "in.jsonl", "--output", "none/out.jsonl"), "a folder that exists", 2),
        (("score", "{model}", "--input", "raw.jsonl", "--output", "out.jsonl"), "raw.jsonl is not text", 1),
        (("tiny", "qwen3", "raw.jsonl"), "raw.jsonl is a file", 2),
        (("tiny", "qwen3", "raw.jsonl/below"), "raw.jsonl", 2),
        (("tiny", "qwen3", "new", "--set", "hidden_size=many"), "hidden_size = 'many'", 2),
        (("tiny", "qwen3", "new", "--set", "hidden_size"), "not KEY=VALUE", 2),
        (("quickstart", "--path", "raw.jsonl"), "raw.jsonl is a file", 2),
        (("chat", "."), "is not a run", 1),
    ],
)
def test_wrong_places_and_values_get_one_line(tmp_path, tiny_qwen3, arguments, says, code):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "tokens": [1, 2]}')
    (tmp_path / "raw.jsonl").write_bytes(b"\xff\xfe")
    one_line(here(*(each.format(model=tiny_qwen3) for each in arguments), cwd=tmp_path), says, code)


def test_a_seed_below_zero_is_refused_before_anything_is_made(tmp_path):
    result = here("quickstart", "--path", "new", "--seed", -1, cwd=tmp_path)
    assert result.returncode == 2
    assert "--seed" in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_parallel_size_of_nothing_is_refused(tmp_path):
    result = here("score", "x", "--input", "in.jsonl", "--output", "out.jsonl", "--tp", 0, cwd=tmp_path)
    assert result.returncode == 2
    assert "--tp" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("routed_experts", "says"),
    [
        ([[[0, 1]], [[0]]], "routed_experts must be"),
        ([[[0, 1]]], "routed_experts must be"),
        ([[[0, 8]], [[0, 1]]], "expert 8 is out of range"),
        ([[[0, -1]], [[0, 1]]], "expert -1 is out of range"),
        ([[[0, 1]], [[3, 3]]], "the same expert twice"),
    ],
)
def test_routed_experts_of_another_model_are_named(tmp_path, routed_experts, says):
    shape = SimpleNamespace(is_moe=True, moe_layers=(False, True), experts_per_token=2, experts=8, vocab_size=9)
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"id": "a\u2028b", "tokens": [1, 2], "routed_experts": routed_experts}, ensure_ascii=False)
    )
    lines = read_lines(tmp_path / "in.jsonl")
    with pytest.raises(DataError, match=says):
        _sequences(lines, shape)
    old = (tmp_path / "in.jsonl").read_text().replace('"routed_experts"', '"routes"')
    (tmp_path / "old.jsonl").write_text(old)
    assert read_lines(tmp_path / "old.jsonl") == lines, "a file of an earlier version is read as before"
    lines[0].routed_experts[:] = [[[0, 7]], [[1, 0]]]
    (sequence,) = _sequences(lines, shape)
    assert sequence.experts_SLK.tolist() == [[[0, 7]], [[1, 0]]]


def test_a_quickstart_deletes_nothing_but_its_own(tmp_path):
    """Not a folder with something else in it, not after --no-fresh was used on it, and not the folder of one that runs."""
    (tmp_path / "mine").write_text("kept")
    one_line(here("quickstart", "--path", tmp_path, cwd=tmp_path), "something else", 2)
    with FileLock(tmp_path / ".quickstart.lock"):
        one_line(here("quickstart", "--path", tmp_path, "--no-fresh", cwd=tmp_path), "in use by another quickstart", 1)
    assert not (tmp_path / ".quickstart").exists()
    (tmp_path / "mine").unlink()
    (tmp_path / ".quickstart").touch()
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / ".quickstart.lock"):
        one_line(here("quickstart", "--path", tmp_path, cwd=tmp_path), "in use by another quickstart", 1)
    assert (tmp_path / "run").is_dir()


def test_a_tiny_base_never_takes_the_place_of_a_run(tmp_path):
    """A model named m-base of the same project has its run where the tiny base of m goes."""
    kept = tmp_path / "runs" / "p" / "m-base" / "steps"
    kept.mkdir(parents=True)
    one_line(here("train", run_file(tmp_path), "--tiny", cwd=tmp_path), "m-base is no tiny model made here", 2)
    assert kept.is_dir()


def test_a_bad_field_of_the_tiny_model_gets_one_line(tmp_path):
    config = run_file(tmp_path, train="[tiny.config]\nhiden_size = 64")
    one_line(here("train", config, "--tiny", cwd=tmp_path), "hiden_size is no field", 2)
    assert not (tmp_path / "runs" / "p" / "m-base").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path):
    making = tmp_path / "q" / "examples" / ".yes-no-maybe-base.making"
    # A shell's background job ignores SIGINT, and its children with it.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from lockstep.cli.main import main; main()"
    command = [sys.executable, "-c", program, "quickstart", "--path", tmp_path / "q"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        end = time.monotonic() + 120
        while not making.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.strip() == "interrupted; published steps are safe, add --no-fresh to go on"


def oversized_checkpoint(folder: Path) -> Path:
    """A checkpoint whose embedding alone is 1 TiB: the file is sparse, only its header takes room."""
    narrow = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    write_tiny("qwen3", folder, seed=0, overrides={"hidden_size": 2**14, "intermediate_size": 32, **narrow})
    config = json.loads((folder / "config.json").read_text())
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    rows = 2**24
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    rest = {key: value for key, value in tensors.items() if key != name}
    save_file(rest, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    size = rows * config["hidden_size"] * 4
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [rows, config["hidden_size"]], "data_offsets": [0, size]}}
    ).encode()
    big = folder / "model-00002-of-00002.safetensors"
    big.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(big, 8 + len(header) + size)
    weight_map = dict.fromkeys(rest, "model-00001-of-00002.safetensors") | {name: big.name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


async def test_no_free_memory_is_said_before_anything_is_allocated(tmp_path):
    folder = oversized_checkpoint(tmp_path / "big")
    config = EngineConfig(str(folder), lora=LoraSettings(8, 16.0, ("q_proj",)))
    with pytest.raises(TrainerError, match="no free memory") as caught:
        await Trainer.start(config, 1, tmp_path / "logs" / "trainer.log")
    assert "\n" not in str(caught.value)


async def test_a_temporary_folder_with_a_long_name_is_named(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(TrainerError, match="set TMPDIR to a shorter folder"):
        await Trainer.start(EngineConfig("none"), 1, tmp_path / "logs" / "trainer.log")
    assert not list(deep.iterdir())


@pytest.mark.server
async def test_chat_reaches_its_own_server_and_a_refusal_is_one_line(server, monkeypatch, tmp_path):
    """Behind a proxy that leads nowhere; then with a message that is longer than the server's context."""

    class Kept:
        base_url, api_key = server.base_url, server.api_key

        async def close(self):
            """The session's server stays."""

    async def serve_step(run, step, progress):
        return Kept(), "base"

    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "serve_step", serve_step)
    said = io.StringIO()
    await asyncio.to_thread(chat_with, tmp_path, "hi", None, Console(file=said))
    assert said.getvalue().startswith("base  ")
    with pytest.raises(ServerError, match="context length") as refused:
        await asyncio.to_thread(chat_with, tmp_path, "many words " * 500, None, Console(file=said))
    assert "\n" not in str(refused.value)


def test_a_dry_run_shows_every_setting_and_starts_nothing(tmp_path, tiny_qwen3):
    config = run_file(tmp_path, model=f'base_model = "{tiny_qwen3}"', train="learning_rate = 3e-4", task="seed = 7")
    result = lockstep("train", config, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    shown = {row[0]: row[1:] for row in rows if row}
    assert shown["max_model_len"][:1] == ["4096"]
    assert "positions" in shown["max_model_len"]
    assert shown["dtype"][0] == "float32"
    assert shown["tool_call_parser"][0] == "hermes"
    assert shown["learning_rate"] == ["0.0003", "set"]
    assert {*MegatronConfig.model_fields, *TaskSection.model_fields, *TrainConfig.model_fields} - {"placement"} <= {
        *shown
    }
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_sft_checks_every_row_and_starts_nothing(tmp_path, tiny_qwen3):
    """Bad rows by line, or the steps and every setting with the schedule's length."""
    good = {"messages": [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]}
    rows = [good] * 5 + [{"messages": []}, {"messages": good["messages"][:1]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = '[sft]\ndata = "chats.jsonl"\nbatch_size = 2\nepochs = 2\nlr_schedule = "linear"\n'
    config = run_file(tmp_path, model=f'base_model = "{tiny_qwen3}"', train=settings)
    says = "chats.jsonl: 2 of 7 rows can't be trained on: line 6: expected"
    one_line(lockstep("sft", config, "--dry-run", cwd=tmp_path), says, 1)
    config = run_file(tmp_path, model=f'base_model = "{tiny_qwen3}"', train=settings + "skip_bad_rows = true")
    result = lockstep("sft", config, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "5 chats" in result.stdout
    assert "5 steps" in result.stdout
    assert "left out: line 7: no message of an assistant" in result.stdout
    shown = {row[0]: row[1:] for line in result.stdout.splitlines() if (row := line.split())}
    assert shown["schedule_steps"][0] == "5"
    assert shown["loss_on"] == ["all", "default"]
    assert not (tmp_path / "runs").exists()
    train = run_file(tmp_path, model=f'base_model = "{tiny_qwen3}"')
    one_line(lockstep("sft", train, cwd=tmp_path), "sft is missing", 2)


def test_a_dry_run_refuses_what_the_run_would(tmp_path, tiny_qwen3):
    config = run_file(tmp_path, model=f'base_model = "{tiny_qwen3}"', train="[backend]\nparallel = { tensor = 3 }")
    one_line(here("train", config, "--dry-run", cwd=tmp_path), "tensor=3 does not divide", 2)
    one_line(here("train", config, cwd=tmp_path), "tensor=3 does not divide", 2)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_tiny_model_leaves_nothing(tmp_path):
    config = run_file(tmp_path, train='[tiny]\nfamily = "llama3"')
    result = here("train", config, "--tiny", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "llama3" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_a_run_past_its_steps_is_refused_before_it_starts(tmp_path, tiny_qwen3):
    config = run_file(tmp_path, model=f'base_model = "{tiny_qwen3}"')
    for step in range(3):
        folder = tmp_path / "runs" / "p" / "m" / "steps" / f"{step:04d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    one_line(here("train", config, cwd=tmp_path), "has 2 steps already; raise [task] steps", 2)


def test_newcomer_c8_a_kl_reference_that_is_no_step_is_refused_before_the_rollouts(tmp_path, tiny_qwen3):
    config = run_file(tmp_path, model=f'base_model = "{tiny_qwen3}"', train="kl_coef = 0.1\nkl_reference_step = 5")
    says = "kl_reference_step = 5 is no published step of runs/p/m: a new run has step 0 alone"
    one_line(here("train", config, "--dry-run", cwd=tmp_path), says, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "seed = -1"}, "task.seed = -1"),
        ({"train": "minibatches = 65"}, "minibatches = 65 (x data = 1) is more than the 64 trajectories"),
        (
            {"model": 'base_model = "x"\nlora = { target_modules = "q_proj" }'},
            "target_modules = 'q_proj': must be a list",
        ),
    ],
)
def test_what_the_file_alone_shows_is_refused_when_it_is_read(tmp_path, change, says):
    with refused_at_once(re.escape(says)):
        load_run_file(run_file(tmp_path, **change))


MARKUP = "Loading weights from [/data/model] [bold]x[/]"


def test_m14_what_looks_like_markup_is_shown_as_it_is():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with LiveTable(console, MARKUP) as table:
        table(StepSummary(step=0, reward=0.5, greedy=0.5))
    stage = {"name": "s", "status": "failed", "seconds": 1.0, "reason": MARKUP, "figures": []}
    console.print(report_table({"model": MARKUP, "family": "f", "layers": "1", "device": "cpu", "stages": [stage]}))
    assert "".join(console.file.getvalue().split()).count("".join(MARKUP.split())) == 3


def test_m14_progress_lines_that_look_like_markup_stop_nothing(monkeypatch, tmp_path):
    """Of a server that starts: the last line of its log."""

    async def serve_step(run, step, progress):
        progress(MARKUP)
        raise ServerError("as far as it goes")

    monkeypatch.setattr("lockstep.backends.megatron.launch.serve_step", serve_step)
    with pytest.raises(ServerError, match="as far as it goes"):
        chat_with(tmp_path, "hello", None, Console(file=io.StringIO(), force_terminal=True))


def test_low_a_lock_names_its_owner_and_a_quickstart_says_what_it_deletes(tmp_path):
    lock = take(tmp_path / ".quickstart.lock")
    try:
        one_line(lockstep("quickstart", "--path", tmp_path), f"in use by another quickstart, process {os.getpid()}", 1)
    finally:
        lock.release()
    first = RunStore(tmp_path / "runs", "p", "m")
    with pytest.raises(StoreError, match=f"in use by process {os.getpid()} .*, since 20"):
        RunStore(tmp_path / "runs", "p", "m")
    first.close()
    (tmp_path / "runs" / "p" / "m" / "steps" / "0007").mkdir()
    (tmp_path / "runs" / "p" / "m" / "steps" / "0007" / "manifest.json").touch()
    console = Console(file=io.StringIO(), width=300)
    _say_what_is_deleted(tmp_path / "runs", console)
    assert console.file.getvalue().strip() == (
        f"deleting    {tmp_path / 'runs' / 'p' / 'm'}, which has step 7; --no-fresh would go on from there"
    )
