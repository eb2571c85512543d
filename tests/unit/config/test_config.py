"""Settings: unknown, impossible and ineffective ones are refused in one line that names them."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportTypedDictNotRequiredAccess=false, reportGeneralTypeIssues=false

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.config.base import Config, load_toml, unsupported
from lockstep.config.lora import SERVED_RANKS, LoraConfig
from lockstep.config.megatron import Parallel, Placement
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError
from lockstep.loop.run_file import RunFile
from lockstep.loop.task import load_task


def refused(build, *parts: str) -> None:
    with pytest.raises(ConfigError) as error:
        build()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"learnin_rate": 1}, ["TrainConfig has no setting 'learnin_rate'", "did you mean learning_rate"]),
        ({"zzz": 1}, ["no setting 'zzz'", "it has", "learning_rate"]),
        ({"learning_rate": 0}, ["learning_rate = 0", "greater than 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate = nan", "finite"]),
        ({"loss": "grpo"}, ["loss = 'grpo'", "must be one of cispo, gmpo, gspo, ppo, reinforce, sapo"]),
        ({"kl_reference_step": 3}, ["kl_reference_step has no effect with kl_coef = 0"]),
        ({"clip_low": 1.5}, ["clip_low = 1.5 has no effect"]),
        ({"importance_cap": 2.0}, ["importance_cap has no effect without importance_correction"]),
        ({"importance_correction": "truncated"}, ["needs old_logprobs = trainer"]),
        (
            {"importance_correction": "masked", "old_logprobs": "trainer", "importance_floor": 0.1},
            ["importance_floor has no effect with importance_correction = masked"],
        ),
        (
            {"importance_correction": "icepop", "old_logprobs": "trainer", "importance_floor": 6.0},
            ["importance_floor = 6.0 is above importance_cap = 5.0"],
        ),
        ({"loss": "gspo", "old_logprobs": "sampling"}, ["loss = gspo with old_logprobs = sampling clips rounding"]),
        (
            {"loss": "gspo", "old_logprobs": "sampling", "clip_low": 0.1},
            ["loss = gspo with old_logprobs = sampling", "set both clip_low and clip_high"],
        ),
        ({"clip_dual": 3.0}, ["clip_dual has no effect with loss = cispo"]),
        ({"loss": "sapo", "clip_low": 0.1}, ["clip_low has no effect with loss = sapo, which does not clip"]),
        (
            {"loss": "sapo", "loss_parameters": {"tau": 1.0}},
            ["loss = sapo has no parameter 'tau'", "it has tau_positive, tau_negative"],
        ),
        ({"loss_parameters": {"tau": 1.0}}, ["loss = cispo has no parameter 'tau': it has none"]),
        ({"kl_estimator": "k2"}, ["kl_estimator has no effect with kl_coef = 0"]),
        (
            {"kl_coef": 0.1, "kl_reference_step": 1, "kl_reference_path": "runs/p/m/steps/0001"},
            ["kl_reference_step and kl_reference_path both name the reference"],
        ),
        ({"kl_in": "reward"}, ["kl_in has no effect with kl_coef = 0"]),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, ["kl_estimator = k1 with kl_in = loss has a gradient of mean zero"]),
        (
            {"kl_coef": 0.1, "kl_in": "reward", "kl_corrected": True},
            ["kl_corrected has no effect with kl_in = reward"],
        ),
        ({"token_normalization": "constant"}, ["constant_length goes with token_normalization = constant"]),
        ({"constant_length": 7}, ["constant_length goes with token_normalization = constant"]),
        ({"importance_level": "sequence"}, ["importance_level has no effect without importance_correction"]),
        ({"overlong_tokens": 9}, ["overlong_tokens and overlong_buffer go together"]),
        ({"overlong_penalty": 2.0}, ["overlong_penalty has no effect without overlong_tokens"]),
        ({"overlong_tokens": 9, "overlong_buffer": 10}, ["overlong_buffer = 10 is more than overlong_tokens = 9"]),
        ({"loss": "reinforce", "epochs": 2}, ["epochs = 2 with loss = reinforce trains on an older policy's tokens"]),
        ({"entropy_coef": -0.1}, ["entropy_coef = -0.1"]),
        ({"loss": "ppo", "clip_dual": 1.1}, ["clip_dual = 1.1 must be above 1 + clip_high = 1.2"]),
        ({"reward_eps": -1e-3}, ["reward_eps = -0.001"]),
        ({"over_length": "drop"}, ["over_length = drop has no effect without row_length"]),
        ({"betas": (0.9, 1.0)}, ["betas", "[0, 1)"]),
        ({"minibatches": 0}, ["minibatches = 0"]),
        ({"max_steps_off_policy": -1}, ["max_steps_off_policy = -1"]),
    ],
)
def test_train_config_refuses(settings, parts):
    refused(lambda: TrainConfig(**settings), *parts)


def test_a7_older_rollouts_need_a_correction_where_the_ratio_does_not_see_them():
    for settings in ({"old_logprobs": "trainer"}, {"loss": "gspo"}):
        refused(
            lambda settings=settings: TrainConfig(max_steps_off_policy=2, **settings),
            "max_steps_off_policy = 2 with old_logprobs = trainer",
            f"loss = {settings.get('loss', 'cispo')}",
            "set importance_correction, or old_logprobs = sampling",
        )
        for correction in ("truncated", "masked", "icepop", "rejected"):
            assert TrainConfig(max_steps_off_policy=2, importance_correction=correction, **settings)
    assert TrainConfig(max_steps_off_policy=2).divides_by == "sampling"
    assert TrainConfig(max_steps_off_policy=2, loss="ppo", old_logprobs="sampling").divides_by == "sampling"


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: LoraConfig(rank=12), ["rank = 12", "what vLLM serves"]),
        (lambda: LoraConfig(alpha=0), ["alpha = 0"]),
        (lambda: LoraConfig(target_modules=()), ["target_modules", "at least one layer"]),
        (lambda: LoraConfig(r=8), ["LoraConfig has no setting 'r'"]),
        (lambda: Placement(trainer=[0, 0], inference=[1]), ["trainer", "each once"]),
        (lambda: Placement(trainer=[0, 1], inference=[1]), ["share GPU 1 but not all"]),
        (lambda: Placement(trainer=[0]), ["inference is missing"]),
        (lambda: Parallel(tensor=0), ["tensor = 0"]),
        (lambda: Parallel(sequence=True), ["sequence = true has no effect with tensor = 1"]),
        (lambda: Parallel(tensor=2, expert=4), ["expert x expert_tensor = 4 must divide tensor x data x context = 2"]),
    ],
)
def test_others_refuse(build, parts):
    refused(build, *parts)


def test_every_served_rank_is_accepted():
    assert [LoraConfig(rank=rank).rank for rank in SERVED_RANKS] == list(SERVED_RANKS)


def test_configs_are_frozen_and_documented():
    for schema in (LoraConfig, Placement, Parallel, TrainConfig):
        assert schema.model_config["frozen"]
        undocumented = [name for name, field in schema.model_fields.items() if not field.description]
        assert undocumented == []
    with pytest.raises(Exception, match="frozen"):
        TrainConfig().learning_rate = 1.0  # type: ignore[misc]


def test_derived_settings():
    assert TrainConfig(loss="ppo").clip_range == (0.8, 1.2)
    assert TrainConfig(loss="cispo").clip_range == (0.0, 5.0)
    assert TrainConfig(loss="gspo", clip_low=0.0, clip_high=0.5).clip_range == (
        1.0,
        1.5,
    )  # 0.0 is a setting, not "unset"
    for loss, old, weighs in (
        ("cispo", "sampling", "token"),
        ("ppo", "sampling", "token"),
        ("gspo", "trainer", "sequence"),
    ):
        assert (TrainConfig(loss=loss).divides_by, TrainConfig(loss=loss).weighs_by) == (old, weighs)
    assert TrainConfig(loss="ppo").dual_clip == 3.0
    assert TrainConfig().reference_step is None
    assert TrainConfig(kl_coef=0.1).reference_step == 0
    assert TrainConfig(kl_coef=0.1, kl_reference_step=4).reference_step == 4
    icepop = TrainConfig(importance_correction="icepop", old_logprobs="trainer", importance_floor=0.0)
    assert icepop.importance_bounds == (0.0, 5.0)
    assert Parallel(tensor=2, data=2, pipeline=3).processes == 12
    assert Parallel(tensor=2).sequence_parallel
    assert not Parallel(tensor=2, sequence=False).sequence_parallel
    assert Placement(trainer=[0, 1], inference=[1, 0]).colocated
    assert not Placement(trainer=[0], inference=[1]).colocated


@given(st.sampled_from(["cispo", "ppo", "gspo"]), st.floats(1e-8, 1), st.none() | st.integers(1, 9), st.booleans())
def test_configs_survive_json(loss, rate, length, share):
    config = TrainConfig(loss=loss, learning_rate=rate, row_length=length, share_prefixes=share)
    assert TrainConfig(**json.loads(json.dumps(config.model_dump(mode="json")))) == config
    lora = LoraConfig(target_modules=("q_proj",))
    assert LoraConfig(**json.loads(lora.model_dump_json())) == lora


def test_unsupported_names_setting_and_backend():
    error = unsupported("loss", "gspo", "TinkerBackend", "the service has no sequence-level ratio")
    assert str(error) == "TinkerBackend does not support loss = 'gspo': the service has no sequence-level ratio"
    assert isinstance(error, ConfigError)


MINIMAL = '[model]\nname = "m"\nproject = "p"\nbase_model = "b"\n[task]\nfile = "t.py"\nsteps = 3\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (MINIMAL + "[train]\nlearnin_rate = 1\n", ["learnin_rate", "did you mean learning_rate"]),
        (MINIMAL + "[trian]\n", ["no setting 'trian'", "did you mean train"]),
        (MINIMAL + "[model.lora]\nrank = 5\n", ["rank = 5"]),
        (MINIMAL.replace("[task]", "lora = true\n[task]"), ["lora = True", "false to train all weights"]),
        (MINIMAL + "stepz = 4\n", ["[task] has no setting 'stepz'", "steps"]),
        (MINIMAL.replace("steps = 3", 'steps = "many"'), ["task.steps = 'many'"]),
        (MINIMAL.replace("steps = 3\n", ""), ["task.steps is missing"]),
        ("[model\n", ["is not TOML"]),
        ("\xff", ["is not TOML"]),
    ],
)
def test_a_bad_run_file_gets_one_line(tmp_path, text, parts):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="latin-1")
    refused(lambda: load_toml(path, RunFile), str(path), *parts)


def test_run_files(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL + "[train]\nlearning_rate = 1e-3\n[model.lora]\nrank = 8\n")
    loaded = load_toml(path, RunFile)
    assert loaded.train.learning_rate == 1e-3
    assert loaded.model.lora == LoraConfig(rank=8)
    path.write_text(MINIMAL)
    assert load_toml(path, RunFile).model.lora == LoraConfig()
    path.write_text(MINIMAL.replace("[task]", "lora = false\n[task]"))
    assert load_toml(path, RunFile).model.lora is None
    path.write_text(MINIMAL + '[backend]\ndtype = "bfloat16"\nrecompute = true\n')
    section = load_toml(path, RunFile).backend
    assert (section.dtype, section.recompute) == ("bfloat16", True)
    assert MegatronBackend(**dict(section)).config == section
    path.write_text(MINIMAL + "[backend]\nreplicas = 2\nplacement = {trainer = [0], inference = [[1], [2, 3]]}\n")
    settings = load_toml(path, RunFile).backend
    assert (settings.replicas, settings.placement.servers) == (2, ((1,), (2, 3)))
    path.write_text(MINIMAL + "[backend]\nseed = 3\n")  # [task] has the run's only seed
    refused(lambda: load_toml(path, RunFile), "set seed in [task]")
    refused(lambda: load_toml(tmp_path / "none.toml", RunFile), "none.toml does not exist")
    refused(lambda: load_toml(tmp_path, RunFile), "is a folder")


def test_a_task_may_import_modules_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "helper_of_this_task.py").write_text("NUMBERS = [4, 5]\n")
    (tmp_path / "task.py").write_text(
        "from helper_of_this_task import NUMBERS\n\ndef scenarios():\n    return NUMBERS\n\n"
        "async def rollout(model, scenario, temperature):\n    raise NotImplementedError\n"
    )
    assert load_task(tmp_path / "task.py").scenarios == [4, 5]


def test_every_setting_says_what_it_is():
    kinds = [Config]
    for kind in kinds:
        kinds += kind.__subclasses__()
    settings = [(kind, name, field) for kind in kinds for name, field in kind.model_fields.items()]
    assert len(settings) > 50
    for kind, name, field in settings:
        nested = any(isinstance(part, type) and issubclass(part, Config) for part in (field.annotation,))
        assert field.description or nested, f"{kind.__name__}.{name} has no description"
        assert name in (kind.__doc__ or "")


def test_m12_a_run_file_without_end_is_refused(tmp_path):
    refused(lambda: load_toml(Path("/dev/zero"), RunFile), "/dev/zero has more than 1 MiB")
    (tmp_path / "run.toml").write_bytes(b"#" * (2 << 20))
    refused(lambda: load_toml(tmp_path / "run.toml", RunFile), "run.toml has more than 1 MiB")
