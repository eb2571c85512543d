"""What the registry knows, refuses and tries; what discovery says; and that neither needs a training environment."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import Recipe, config_json
from lockstep.errors import ConfigError, UnsupportedModelError
from lockstep.inference.vllm_args import model_arguments, server_facts
from lockstep.models.contract import Layout
from lockstep.models.discovery import inspect_architecture
from lockstep.models.registry import (
    check_dependency_floors,
    default_target_modules_for_model,
    get_model_config,
    get_model_support_handler,
    get_model_support_spec,
    is_model_support_registered,
    list_model_support_specs,
    load_model_config,
    model_is_moe,
    native_vllm_lora_status_for_model,
    spec_of_folder,
)
from lockstep.models.spec import DependencyFloor
from lockstep.models.targets import available_targets, check_targets
from lockstep.models.tiny.write import tiny_models, write_tiny

SPECS = list_model_support_specs()


def folder_with(raw: dict, folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "~/none", "runs/p/none", "qwen3"])
def test_a_folder_that_is_not_there_is_said_to_be_none(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="neither a folder here nor a Hugging Face id"):
        get_model_support_spec(name)


def test_keys_names_and_architectures_are_unambiguous() -> None:
    for values in (
        [s.key for s in SPECS],
        [n for s in SPECS for n in s.model_names],
        [a for s in SPECS for a in s.architectures],
        [t for s in SPECS for t in s.model_types],
    ):
        assert len(values) == len(set(values))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.key)
def test_every_name_and_a_tiny_folder_find_their_family(spec, tmp_path: Path) -> None:
    assert {get_model_support_spec(name) for name in spec.model_names} == {spec}
    assert get_model_config(spec.model_names[0]).target_modules == spec.default_target_modules
    folder = write_tiny(spec.key, tmp_path / "tiny")
    assert get_model_support_spec(str(folder)) == spec
    handler = get_model_support_handler(str(folder))
    assert handler.spec == spec
    assert model_is_moe(str(folder)) is spec.is_moe


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.key)
def test_targets_are_those_of_the_model(spec, tmp_path: Path) -> None:
    folder = str(write_tiny(spec.key, tmp_path / "tiny"))
    shards = get_model_support_handler(folder).all_shards(load_model_config(folder), Layout())
    assert set(available_targets(shards)) <= set(spec.lora_targets)
    assert check_targets(spec, shards, None) == tuple(t for t in spec.default_target_modules if t in spec.lora_targets)
    for wrong in (["lm_head"], [], ["q_proj", "q_proj"]):
        with pytest.raises(ConfigError, match=r"target_modules: .*choose from .*q_proj"):
            check_targets(spec, shards, wrong)


def test_unknown_models_are_refused_with_what_is_known(tmp_path: Path) -> None:
    folder = folder_with({"architectures": ["Mistral9ForCausalLM"]}, tmp_path / "m")
    for name in ("mistralai/Mistral-9", folder):
        with pytest.raises(
            UnsupportedModelError, match=r"qwen3_5_moe: .*docs/how-to/add-a-model.md.*allow_unvalidated_arch"
        ):
            get_model_support_spec(name)
        assert not is_model_support_registered(name)
    with pytest.raises(UnsupportedModelError, match="Mistral9ForCausalLM"):
        get_model_support_spec(folder)
    with pytest.raises(UnsupportedModelError, match="no family is near enough"):
        get_model_support_spec("mistralai/Mistral-9", allow_unvalidated_arch=True)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Qwen/Qwen3-9000B", "qwen3"),
        ("someone/Qwen3-90B-A3B-finetune", "qwen3_moe"),
        ("Qwen/Qwen3.5-777B", "qwen3_5"),
        ("Qwen/Qwen3.5-777B-A7B", "qwen3_5_moe"),
    ],
)
def test_the_nearest_family_is_tried_aloud(name: str, key: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert get_model_support_spec(name, allow_unvalidated_arch=True).key == key
    assert name in caplog.text
    assert key in caplog.text


def test_dependency_floors_are_checked() -> None:
    spec = SPECS[0]
    check_dependency_floors(spec)
    check_dependency_floors(replace(spec, dependency_floors=(DependencyFloor("not-installed-at-all", "99", "x"),)))
    check_dependency_floors(replace(spec, dependency_floors=(DependencyFloor("transformers", "5.9", "x"),)))
    with pytest.raises(ConfigError, match=r"needs transformers>=99.1 \(the classes\), but .* is installed"):
        check_dependency_floors(
            replace(spec, dependency_floors=(DependencyFloor("transformers", "99.1", "the classes"),))
        )


def hybrid(layers: list[str], **more: object) -> Recipe:
    fields = {"hidden_size": 8, "vocab_size": 9, "num_hidden_layers": len(layers), "layer_types": layers, **more}
    return Recipe("qwen3_5", fields, released=True, mtp={"mtp_num_hidden_layers": 1})


def test_discovery_from_config_alone(tmp_path: Path) -> None:
    full, linear = "full_attention", "linear_attention"
    folder = folder_with(config_json(hybrid([linear, linear, full, linear])), tmp_path / "a")
    report = inspect_architecture(folder)
    assert [(f.key, f.count, f.first_layer) for f in report.layer_families] == [
        ("linear_attention+dense", 3, 0),
        ("full_attention+dense", 1, 2),
    ]
    assert report.minimum_layers == 3
    raw = config_json(hybrid([full]))
    raw["text_config"]["logit_softcap"] = 30.0
    raw["surprise"] = None
    report = inspect_architecture(folder_with(raw, tmp_path / "b"))
    assert report.minimum_layers == 1
    assert any("text_config.logit_softcap" in risk for risk in report.unresolved_risks)
    assert not any("surprise" in risk for risk in report.unresolved_risks)
    moe = Recipe("qwen3_moe", {"num_hidden_layers": 6, "mlp_only_layers": [0, 1, 2]})
    report = inspect_architecture(folder_with(config_json(moe), tmp_path / "c"))
    assert [f.key for f in report.layer_families] == ["full_attention+dense", "full_attention+moe"]
    assert report.minimum_layers == 4


def test_an_unvalidated_architecture_is_a_risk(tmp_path: Path) -> None:
    raw = config_json(hybrid(["full_attention"])) | {"architectures": ["Qwen3_5NovelForCausalLM"]}
    folder = folder_with(raw, tmp_path / "a")
    report = inspect_architecture(folder, allow_unvalidated_arch=True)
    assert any("Qwen3_5NovelForCausalLM is not validated" in risk for risk in report.unresolved_risks)


BARE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "megatron", "vllm", "peft", "safetensors", "numpy", "huggingface_hub"}:
            raise ModuleNotFoundError(f"blocked: {name}")
sys.meta_path.insert(0, Blocked())
from lockstep.models import contract, config, layout_rules, spec, discovery, targets, handler
from lockstep.models.checkpoint import hub
from lockstep.models import registry as r
from lockstep.errors import UnsupportedModelError
for s in r.list_model_support_specs():
    name = s.model_names[0]
    print(r.get_model_config(name).target_modules, r.native_vllm_lora_status_for_model(name), r.model_is_moe(name))
    assert r.default_target_modules_for_model(name) == list(s.default_target_modules)
folder = sys.argv[1]
print(discovery.inspect_architecture(folder))
c = r.load_model_config(folder)
print(len(r.get_model_support_handler(folder).shards(c, contract.Layout(), contract.Sizes(tp=2), range(c.layers))))
try:
    r.load_model_config("Qwen/Qwen3-8B")
except UnsupportedModelError as error:
    print(error)
"""


def test_works_without_a_training_environment(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_5_moe", tmp_path / "tiny")
    done = subprocess.run([sys.executable, "-c", BARE, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "huggingface_hub" in done.stdout


def test_status_is_a_known_word_and_evidence_is_named() -> None:
    for spec in SPECS:
        assert native_vllm_lora_status_for_model(spec.model_names[0]) in ("disabled", "wip", "validated")
        assert (Path(__file__).parents[3] / spec.evidence).is_file()
        assert default_target_modules_for_model(spec.model_names[0])
    assert set(tiny_models()) == {s.key for s in SPECS}


@pytest.mark.parametrize(
    ("family", "architecture", "plain", "with_adapters", "short_prompts"),
    [
        ("qwen3", "Qwen3ForCausalLM", [], [], True),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", ["--language-model-only"], [], False),
        ("qwen3_5_moe", "Qwen3_5MoeForCausalLM", [], ["--enable-mixed-moe-lora-format"], False),
        ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", ["--language-model-only"], [], False),
        (None, "SomebodysForCausalLM", [], [], True),
    ],
)
def test_what_the_server_is_told_of_a_family(
    tmp_path, family, architecture, plain, with_adapters, short_prompts
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    spec = spec_of_folder(tmp_path)
    assert (spec and spec.key) == family
    assert model_arguments(tmp_path, lora=False) == plain
    assert model_arguments(tmp_path, lora=True) == plain + with_adapters
    assert server_facts(tmp_path).one_token_prompts_on_cpu is short_prompts
