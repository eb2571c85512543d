"""What a new user stumbles over in the first hour, each with what is shown instead."""

import asyncio
import io
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import huggingface_hub
import pytest
from openai.types.chat.chat_completion import Choice
from rich.console import Console

import lockstep as ls
from lockstep.backends.base import TrainResult
from lockstep.batching.tokenize import tokenize
from lockstep.cli.base_models.tiny_model import check_tiny, make_tiny
from lockstep.cli.quickstart.tiny import run_quickstart
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError, DataError, RolloutError, UnsupportedModelError
from lockstep.loop.run_file import RunFile, TaskSection
from lockstep.loop.synchronous import run
from lockstep.loop.task import load_task
from lockstep.metrics.names import is_known
from lockstep.models.checkpoint.hub import described_folder
from lockstep.models.tiny.write import write_tiny
from lockstep.rollouts import failures
from lockstep.rollouts.failures import failure_of
from lockstep.rollouts.parquet import read_parquet
from lockstep.runs.store import RunStore
from lockstep_vllm.http.served_names import unknown_name
from lockstep_wire.reply_digest import reply_digest
from nothing_started import refused_at_once
from random_batches import choice, trajectory


class Model:
    """As much of a registered model as the loop asks for."""

    step = 0


class Backend:
    """Keeps metrics in a real run's store and trains nothing."""

    def __init__(self, store):
        self.store = store

    def record(self, model, metrics, step=None):
        self.store.record(model.step, metrics)

    async def recover(self, model):
        return False

    async def train(self, model, groups, config=None):
        model.step += 1
        seconds = {
            "seconds_train": 1.0,
            "seconds_sync": 0.1,
            "seconds_compile": 0.5,
            "compilations": float(model.step == 1),
        }
        return TrainResult(model.step, {"loss": 0.0, **seconds}, self.store.path)


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path, "tests", "newcomer")
    yield store
    store.close()


def task_file(tmp_path, rollout):
    file = tmp_path / "task.py"
    file.write_text(f"def scenarios():\n    return [0, 1]\n\n\n{rollout}")
    return load_task(file)


async def looped(store, task, rows=None, **settings):
    section = TaskSection(**{"file": "task.py", "steps": 2, "groups_per_step": 2, "group_size": 2} | settings)
    rows = [] if rows is None else rows
    return await run(Model(), Backend(store), task, section, ls.TrainConfig(), store.path, rows.append)


@pytest.mark.parametrize("what", ["evaluation of step 0", "rollouts for step 1"])
async def test_newcomer_a1_a_bug_in_a_rollout_is_told_with_file_line_and_frames(store, tmp_path, what):
    """The commonest error of all, in the first evaluation too; all tracebacks are in the file that the line names."""
    condition = "True" if what.startswith("evaluation") else "temperature"
    rollout = f"""async def rollout(model, scenario, temperature):
    return look_up({{}}, {condition})


def look_up(d, asked):
    from json import loads
    from random_batches import trajectory
    return loads("{{") if asked else trajectory(reward=0.0)
"""
    task = task_file(tmp_path, rollout)
    with pytest.raises(RolloutError) as error:
        await looped(store, task)
    place = f"{tmp_path}/task.py"
    says = str(error.value)
    assert says.startswith(f"{what}: ")
    assert "\n" not in says
    assert f"({place}:6 in rollout: return look_up({{}}, {condition}) > {place}:12 in look_up: return loads(" in says
    assert "json/decoder.py" not in says  # the last frames are the user's, not those of a library
    kind, number = ("evaluation", 0) if what.startswith("evaluation") else ("train", 1)
    file = store.path / "trajectories" / kind / f"{number:04d}.parquet"
    assert str(file) in says
    failures = [failure for group in read_parquet(file) for failure in group.exceptions]
    assert failures
    assert all("json/decoder.py" in failure.traceback for failure in failures)


def test_newcomer_a1_a_bad_reward_is_told_in_one_line():
    try:
        ls.Trajectory(messages_and_choices=[], reward=None)
    except ValueError as error:
        failure = failure_of(error)
    assert failure.message.startswith("Trajectory: reward = None: input should be a valid number")
    assert "test_newcomer.py" in failure.where


def test_newcomer_a1_a_linked_package_is_no_users_file(tmp_path, monkeypatch):
    """uv links packages where it is asked to: their files lie elsewhere than they are installed."""
    (tmp_path / "elsewhere").mkdir()
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "library").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(failures, "_INSTALLED", (f"{installed}/",))
    library: dict = {"__name__": "library.calls"}
    (installed / "library" / "calls.py").write_text("def call():\n    raise ValueError('refused')\n")
    place = installed / "library" / "calls.py"
    exec(compile(place.read_text(), str(place), "exec"), library)
    with pytest.raises(ValueError, match="refused") as error:
        library["call"]()
    assert failure_of(error.value).where.endswith('library["call"]()')


async def test_newcomer_a5_a_failed_rollout_is_tolerated_and_a_hanging_one_ends(store, tmp_path):
    """By default one of ten may fail, and a rollout that never answers is one of those."""
    rollout = """async def rollout(model, scenario, temperature, calls=[]):
    import asyncio
    from random_batches import trajectory
    calls.append(1)
    if len(calls) == 3:
        await asyncio.sleep(60)
    return trajectory(reward=float(scenario))
"""
    outcome = await looped(store, task_file(tmp_path, rollout), steps=1, rollout_timeout_s=0.2)
    assert outcome.step == 1
    groups = read_parquet(store.path / "trajectories" / "train" / "0001.parquet")
    (failure,) = [failure for group in groups for failure in group.exceptions]
    assert failure.message == "it took longer than 0.2 s ([task] rollout_timeout_s)"
    assert failure.where.endswith("task.py:10 in rollout: await asyncio.sleep(60)")


async def test_newcomer_a5_a_fraction_never_tolerates_all_and_the_error_says_where_to_set_it(store, tmp_path):
    task = task_file(tmp_path, "async def rollout(model, scenario, temperature):\n    raise ValueError(scenario)\n")
    with pytest.raises(RolloutError, match=r"2 of 2 rollouts failed, 1 tolerated.* raise \[task\] max_exceptions"):
        await looped(store, task, max_exceptions=0.9)
    with pytest.raises(ConfigError, match=r"max_exceptions = 1\.5 must be a whole number, or a fraction below 1"):
        await ls.gather_trajectory_groups([[asyncio.sleep(0)]], max_exceptions=1.5, progress=False)


async def test_newcomer_a6_an_evaluation_is_kept(store, tmp_path):
    """Its mean is in the run's SQLite file under the step that it is of, and its rollouts are on disk."""
    rollout = """async def rollout(model, scenario, temperature):
    from random_batches import trajectory
    return trajectory(reward=scenario + model.step)


def evaluation_scenarios():
    return [10, 20, 30]
"""
    await looped(store, task_file(tmp_path, rollout))
    with closing(sqlite3.connect(store.path / "run.sqlite")) as database:
        rows = database.execute("SELECT step, value FROM metrics WHERE name = 'greedy_reward' ORDER BY step").fetchall()
    assert rows == [(0, 20.0), (1, 21.0), (2, 22.0)]
    assert all(is_known(name) for values in store.metrics().values() for name in values)
    for step in range(3):
        groups = read_parquet(store.path / "trajectories" / "evaluation" / f"{step:04d}.parquet")
        assert [group.trajectories[0].reward for group in groups] == [10.0 + step, 20.0 + step, 30.0 + step]


async def test_newcomer_b7_row_metrics_files_and_checkpoint_have_one_number(store, tmp_path):
    """Row k: the rewards that step k was trained on, as in its Parquet file, and the greedy reward of step k itself."""
    rollout = """async def rollout(model, scenario, temperature):
    from random_batches import trajectory
    return trajectory(reward=model.step + (0.5 if temperature else 0.0))
"""
    rows = []
    outcome = await looped(store, task_file(tmp_path, rollout), rows)
    assert [(row.step, row.greedy) for row in rows] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert [row.reward for row in rows[1:]] == [0.5, 1.5]
    for row in rows[1:]:
        groups = read_parquet(store.path / "trajectories" / "train" / f"{row.step:04d}.parquet")
        assert {each.reward for group in groups for each in group.trajectories} == {row.reward}
    assert outcome.step == 2
    assert [row.compilations for row in rows] == [0, 1, 0]


def tiny_run(tmp_path, task_code, **settings):
    """A run file with a tiny base model of one layer, and its task."""
    (tmp_path / "task.py").write_text(task_code)
    sections = {
        "model": {"name": "m", "project": "p", "base_model": "x"},
        "backend": {"path": tmp_path / "runs"},
        "task": {"file": "task.py", "steps": 1},
        "tiny": {"config": {"num_hidden_layers": 1}, "warmup_steps": 1},
    }
    return RunFile(**sections | settings), load_task(tmp_path / "task.py")


SHOWS = """def scenarios():
    return [0]


async def rollout(model, scenario, temperature):
    raise RuntimeError("never reached")


def demonstrations(rng):
    return [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}], "tools": None}]
"""


async def test_newcomer_b3_changed_demonstrations_are_noticed(tmp_path):
    """The base that was taught others is not trained on in silence: it is kept for the same ones, and refused for others."""
    console = Console(file=io.StringIO())
    file, task = tiny_run(tmp_path, SHOWS)
    folder = await make_tiny(tmp_path / "runs" / "p" / "m-base", file, task, console)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    await make_tiny(folder, *tiny_run(tmp_path, SHOWS + "# a comment\n"), console)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    changed = tiny_run(tmp_path, SHOWS.replace('"yes"', '"no"'))
    for refused in (lambda: check_tiny(folder, *changed), lambda: asyncio.run(make_tiny(folder, *changed, console))):
        with pytest.raises(ConfigError, match=r"m-base was made with other demonstrations\(\) .*: delete both"):
            await asyncio.to_thread(refused)
    with pytest.raises(ConfigError, match=r"task.py demonstrations\(\) failed: KeyError: 'x' \(.*task.py:10 in demon"):
        check_tiny(folder, *tiny_run(tmp_path, SHOWS.replace("return [{", "return {}['x'] or [{")))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = {}['model']\n", r"can't be imported: KeyError: 'model' \(.*task\.py:1 in <module>: x = {}\['model'\]\)"),
        (
            "import no_such_module\n",
            r"can't be imported: ModuleNotFoundError: No module named 'no_such_module' \(.*:1 in",
        ),
        ("def scenarios(:\n    pass\n", r"can't be imported: SyntaxError: invalid syntax \(task\.py, line 1\)"),
        (
            "import json\njson.loads('{')\n",
            r"can't be imported: JSONDecodeError: .*task\.py:2 in <module>: json\.loads",
        ),
        (
            SHOWS.replace("return [0]", "return open('/no/such/file').read()"),
            r"scenarios\(\) failed: FileNotFoundError: .*task\.py:2 in scenarios: return open",
        ),
        (
            SHOWS.replace("return [0]", "yield 1 / 0"),
            r"scenarios\(\) failed: ZeroDivisionError: .*task\.py:2 in scenarios: yield",
        ),
    ],
)
def test_newcomer_c4_an_error_in_a_task_file_is_one_line(tmp_path, code, says):
    (tmp_path / "task.py").write_text(code)
    with refused_at_once(f"task.py {says}"):
        load_task(tmp_path / "task.py")


def test_newcomer_c4_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(
        ConfigError, match=r"the folder of the tiny model: /proc/foo can't be made: No such file or dir"
    ):
        write_tiny("qwen3", "/proc/foo")
    with pytest.raises(ConfigError, match=r"--path: /proc/foo can't be made: .*; choose another folder"):
        asyncio.run(run_quickstart(Path("/proc/foo"), 0, True, Console(file=io.StringIO())))


@pytest.mark.parametrize(
    ("where", "settings", "says"),
    [
        (TrainConfig, {"lr": 1e-4}, "TrainConfig has no setting 'lr': here it is learning_rate"),
        (TrainConfig, {"beta": 0.1}, "here it is kl_coef"),
        (TaskSection, {"batch_size": 8}, "here it is groups_per_step"),
        (
            TrainConfig,
            {"loss": "grpo"},
            "loss = 'grpo': must be one of cispo, gmpo, gspo, ppo, reinforce, sapo (GRPO's clipped ratio is that of ppo), or",
        ),
        (
            TaskSection,
            {"file": "t.py", "steps": 1, "temperature": 0.001},
            "temperature = 0.001: input should be greater",
        ),
        (
            ls.MegatronBackend,
            {"server_args": ("--max-num-seq", "3")},
            "no option --max-num-seq: did you mean --max-num-seqs",
        ),
        (ls.MegatronBackend, {"server_args": ("--logprobs-m=raw_logprobs",)}, "no option --logprobs-m: did you mean"),
        (ls.MegatronBackend, {"server_args": ("--qqqqqqqq",)}, "no option --qqqqqqqq: see `vllm serve --help`"),
        (ls.MegatronBackend, {"server_args": ("--config=a.yaml",)}, "can't have --config: a file's settings would win"),
    ],
)
def test_newcomer_c8_what_can_be_refused_early_is(where, settings, says):
    with refused_at_once(re.escape(says)):
        where(**settings)


@pytest.mark.parametrize("name", ["tinyy", "/no/such/model", "./model", "a/b/c"])
def test_newcomer_c8_a_folder_that_is_missing_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with refused_at_once(
        "is no folder here, and no Hugging Face id, which is ORGANIZATION/NAME", UnsupportedModelError
    ):
        described_folder(name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TaskSection(file="task.py", steps="3"), "steps = '3': must be a number, not a text"),
        (
            lambda: TaskSection(file="task.py", steps=3, max_exceptions=1.5),
            "max_exceptions = 1.5: must be a whole number",
        ),
        (lambda: TaskSection(file="task.py", steps=True), "steps = True: must be a number, not a truth value"),
        (lambda: ls.TrainConfig(learning_rate="1e-4"), "learning_rate = '1e-4': must be a number, not a text"),
        (lambda: ls.LoraConfig(rank="16"), "rank = '16': must be a number, not a text"),
        (lambda: ls.MegatronBackend(max_model_len="4096"), "max_model_len = '4096': must be a number, not a text"),
        (lambda: ls.MegatronBackend(enable_expert_replay=1), "enable_expert_replay = 1: must be true or false"),
        (lambda: ls.Placement(trainer=["0"], inference=[1]), "trainer = ['0']: must be a number, not a text"),
        (lambda: TaskSection(file="task.py", steps=2, temperature=1), None),
        (lambda: ls.Placement(trainer=[0], inference=[1]), None),
    ],
)
def test_newcomer_b4_settings_are_not_converted(make, says):
    if says is None:
        make()
        return
    with pytest.raises(ConfigError, match=re.escape(says)):
        make()


def test_newcomer_b4_a_reward_is_no_text():
    with pytest.raises(DataError, match=r"'0\.5' is a text: rewards and metrics must be numbers"):
        ls.Trajectory(messages_and_choices=[], reward="0.5")
    with pytest.raises(DataError, match="'2' is a text"):
        ls.Trajectory(messages_and_choices=[], reward=1, metrics={"turns": "2"})


async def test_newcomer_b4_a_dict_is_no_train_config():
    backend = ls.MegatronBackend()
    model = ls.TrainableModel(name="m", project="p", base_model="none")
    with pytest.raises(ConfigError, match=r"train takes a TrainConfig, not a dict: write TrainConfig\(\*\*settings\)"):
        await backend.train(model, [], {"learning_rate": 1e-5})


@pytest.mark.parametrize(
    ("asked", "served", "says"),
    [
        (
            "m@0",
            ["m@11", "m@12"],
            "`m@0` is no longer served: ask for model.inference_name(), which is m@12 now (m@11 too)",
        ),
        ("m", ["m@12"], "`m` does not exist: ask for model.inference_name(), which is m@12 now"),
        ("Qwen/Qwen3-8B", ["m@12"], "does not exist"),
    ],
)
def test_newcomer_b6_a_404_names_what_is_served(asked, served, says):
    assert says in unknown_name(asked, served)


def answered(text, **changes):
    """A choice as the server sends it, with its digest."""
    made = choice([1, 2], [3, 4]).model_dump()
    made["message"] = {"role": "assistant", "content": text, "tool_calls": []}
    made["reply_digest"] = reply_digest(made["token_ids"], made["message"])
    return Choice.model_validate(made | changes)


def test_newcomer_b8_what_has_no_ids_says_what_to_ask_for():
    with pytest.raises(
        DataError,
        match=r"no prompt_token_ids: .*ask without stream; a choice that is put together from a stream has none",
    ):
        tokenize(trajectory(answered("yes", prompt_token_ids=None)), "m", 0, 0)
    with pytest.raises(
        DataError,
        match=r"has no logprobs though it has token ids: keep the choice exactly as the server returned it",
    ):
        tokenize(trajectory(answered("yes", sampled_logprobs=None)), "m", 0, 0)


def test_newcomer_b9_an_edited_choice_is_refused():
    """Text, tool calls, or the ids below them; what clients add on their way changes nothing."""
    call = {"id": "1", "type": "function", "function": {"name": "pay", "arguments": "{}"}}
    good = answered("yes")
    assert len(tokenize(trajectory(good, Choice.model_validate_json(good.model_dump_json())), "m", 0, 0).sequences) == 2
    edited, called = answered("yes"), answered("yes")
    edited.message.content = "edited!"
    called.message = type(called.message).model_validate({"role": "assistant", "content": "yes", "tool_calls": [call]})
    for bad in (edited, called, answered("yes", token_ids=[3, 5])):
        with pytest.raises(DataError, match="group 0, trajectory 0, choice 0 was edited after it was sampled"):
            tokenize(trajectory(bad), "m", 0, 0)
