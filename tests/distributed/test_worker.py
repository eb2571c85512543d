"""The trainer process end to end over its socket, and what it leaves on disk."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cases import reference_logprobs, tiny
from lockstep.batching.pack import save_batch
from lockstep.batching.packed_batch import PackedBatch, scored_row
from lockstep.config.train import TrainConfig
from lockstep.validate.reference.batches import batch_of, sequence, tree_sequences
from lockstep.validate.reference.hugging_face import hugging_face
from parent import Parent

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def engine(model: Path, targets: list[str] | None = None, **parallel: Any) -> dict[str, Any]:
    lora = None if targets == [] else {"rank": 8, "alpha": 16, "targets": targets or TARGETS}
    return {"model": str(model), "parallel": parallel, "lora": lora, "seed": 3}


def config(**settings: Any) -> dict[str, Any]:
    return TrainConfig(**{"learning_rate": 1e-2, "max_mismatch": None} | settings).model_dump(mode="json")


def written(folder: Path, rng: np.random.Generator, name: str, **options: Any) -> tuple[PackedBatch, str]:
    batch = batch_of(tree_sequences(rng, leaves=9), rng, **options)
    save_batch(batch, folder / name)
    return batch, str(folder / name)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One worker's life: step 0, three steps with a resume in between, a reference, scores, and errors it must survive."""
    folder = tmp_path_factory.mktemp("worker")
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    model = tiny("qwen3", folder / "model", seed=1)
    batch, path = written(folder, rng, "a.safetensors", row_length=32)
    second, other = written(folder, rng, "b.safetensors", row_length=32, minibatches=2)
    parent, answers = (
        Parent(folder / "process", engine(model)),
        {"folder": folder, "model": model, "batch": batch, "second": second},
    )
    answers["ready"] = parent.ready
    parent.call("save", out=str(folder / "s0"))
    answers["step1"] = parent.call("train_step", batch=path, config=config(), out=str(folder / "s1"))
    parent.call("score", batch=path, out=str(folder / "scored.safetensors"))
    answers["step2"] = parent.call("train_step", batch=other, config=config(minibatches=2), out=str(folder / "s2"))
    answers["load"] = parent.call("load", step_dir=str(folder / "s1"))
    parent.call("save", out=str(folder / "s1-again"))
    parent.call("train_step", batch=other, config=config(minibatches=2), out=str(folder / "s2-again"))
    nonfinite = batch_of(tree_sequences(rng), rng)
    nonfinite.sequence_advantage_Q[0] = np.inf
    save_batch(nonfinite, folder / "inf.safetensors")
    answers["errors"] = {
        "unknown verb": parent.ask("jump"),
        "no file": parent.ask("train_step", batch=str(folder / "none"), config=config(), out=str(folder / "x1")),
        "unknown setting": parent.ask("train_step", batch=path, config={"speed": 2}, out=str(folder / "x2")),
        "mismatch": parent.ask("train_step", batch=path, config=config(max_mismatch=1e-3), out=str(folder / "x3")),
        "token mismatch": parent.ask(
            "train_step", batch=path, config=config(max_token_mismatch=1e-3), out=str(folder / "x6")
        ),
        "not finite": parent.ask(
            "train_step", batch=str(folder / "inf.safetensors"), config=config(), out=str(folder / "x4")
        ),
        "no reference": parent.ask("train_step", batch=path, config=config(kl_coef=0.1), out=str(folder / "x5")),
        "no step": parent.ask("load", step_dir=str(folder / "nowhere")),
        "taken": parent.ask("save", out=str(folder / "s1")),
    }
    parent.call("save", out=str(folder / "after-errors"))
    answers["kl"] = parent.call(
        "train_step",
        batch=path,
        config=config(kl_coef=0.1, old_logprobs="trainer"),
        out=str(folder / "s3"),
        reference=str(folder / "s1"),
    )
    request = {"verb": "train_step", "job": "0009-lora_step-1", "batch": path, "config": config(), "out": None}
    answers["job"] = [parent.ask(**request), parent.ask(**request), parent.ask(**request | {"job": "0009-lora_step-2"})]
    parent.call("load", step_dir=str(folder / "s1"))
    answers["job"].append(parent.ask(**request))
    far = batch_of(tree_sequences(rng), rng)
    far.logprobs_RS[far.loss_mask_RS] = -200.0
    save_batch(far, folder / "far.safetensors")
    answers["far"] = [
        parent.ask("train_step", batch=str(folder / "far.safetensors"), config=config(), out=str(folder / "x7")),
        parent.ask("save", out=str(folder / "x8")),
    ]
    answers["events"], answers["status"] = parent.events, parent.close()
    return answers


def test_lives_and_ends(run: dict[str, Any]) -> None:
    assert run["ready"]["result"]["world"] == 1
    assert run["status"] == 0
    assert {e["phase"] for e in run["events"]} >= {
        "prepare",
        "forward_backward",
        "optimizer",
        "save",
        "score",
        "reference",
    }


def test_a_job_that_is_repeated_is_done_once(run: dict[str, Any]) -> None:
    """The same step asked for twice was once two optimizer steps. After a load the weights of before are back: done anew."""
    first, repeated, another, after_load = (reply["result"]["metrics"] for reply in run["job"])
    assert repeated == first
    assert another["loss"] != first["loss"]
    assert after_load["loss"] != first["loss"]


def test_a_metric_that_is_no_number_is_named_and_the_trainer_goes_on(run: dict[str, Any]) -> None:
    step, save = (answer["error"] for answer in run["far"])
    assert step["type"] == "TrainerError"
    assert re.match(r"the step's \w+ is (inf|nan): ", step["message"])
    assert "load the last published step first" in save["message"]
    assert not (run["folder"] / "x7").exists()


def test_metrics_are_finite_and_complete(run: dict[str, Any]) -> None:
    for step in ("step1", "step2", "kl"):
        metrics = run[step]["metrics"]
        assert all(np.isfinite(v) for v in metrics.values())
        wanted = {
            "loss",
            "kl",
            "clip_fraction",
            "entropy",
            "ess",
            "grad_norm",
            "tokens",
            "mismatch",
            "mismatch_pct",
            "mismatch_max",
        }
        assert wanted <= set(metrics)
        assert metrics["grad_norm"] > 0
    assert run["kl"]["metrics"]["kl_reference"] >= 0
    assert run["kl"]["metrics"]["ratio_mean"] == pytest.approx(
        1.0, abs=1e-6
    )  # the trainer's own logprobs before its only update
    assert run["step2"]["metrics"]["updates"] == 3


def test_resume_is_exact_to_the_byte(run: dict[str, Any]) -> None:
    folder = run["folder"]
    assert run["load"] == {"updates": 1}
    assert bytes_of(folder / "s1") == bytes_of(folder / "s1-again")
    assert bytes_of(folder / "s2") == bytes_of(folder / "s2-again")
    assert bytes_of(folder / "s1") != bytes_of(folder / "s2")


def test_errors_name_the_thing_and_change_nothing(run: dict[str, Any]) -> None:
    folder, errors = run["folder"], {name: reply["error"] for name, reply in run["errors"].items()}
    largest = largest_mismatch_of_hugging_face(run)
    assert {name: error["type"] for name, error in errors.items()} == {
        "unknown verb": "ConfigError",
        "no file": errors["no file"]["type"],
        "unknown setting": "ConfigError",
        "mismatch": "MismatchError",
        "token mismatch": "MismatchError",
        "not finite": "TrainerError",
        "no reference": "ConfigError",
        "no step": "WeightsError",
        "taken": "StoreError",
    }
    for name, part in (
        ("unknown verb", "jump"),
        ("unknown setting", "speed"),
        ("mismatch", "max_mismatch"),
        ("token mismatch", "max_token_mismatch"),
        ("token mismatch", f"{largest[0]}, token {largest[1]}: "),
        ("not finite", "s0"),
    ):
        assert part in errors[name]["message"]
    assert bytes_of(folder / "after-errors") == bytes_of(folder / "s2-again")


def largest_mismatch_of_hugging_face(run: dict[str, Any]) -> tuple[str, int]:
    """(name, position) of the token whose made-up sampling logprob is farthest from the model's after the second step."""
    from peft import PeftModel

    folder, batch = run["folder"], run["batch"]
    model = PeftModel.from_pretrained(hugging_face(run["model"]), str(folder / "s2" / "adapter"))
    largest, largest_at = 0.0, ("", -1)
    for q, name in enumerate(batch.sequence_ids):
        row, path = int(batch.row_Q[q]), batch.path_index(q)
        scored = batch.scored_index_P[batch.scored_offsets_Q[q] : batch.scored_offsets_Q[q + 1]]
        places = np.searchsorted(path, scored)
        new = reference_logprobs(model, batch.tokens_RS[row, path]).detach().numpy()[places - 1]
        off = np.abs(new - batch.logprobs_RS[row, scored])
        if off.max() > largest:
            largest, largest_at = float(off.max()), (name, int(places[off.argmax()]))
    return largest_at


def test_identity_adapter_first(run: dict[str, Any]) -> None:
    tensors = load_file(run["folder"] / "s0" / "adapter" / "adapter_model.safetensors")
    assert tensors
    assert all(not t.any() for name, t in tensors.items() if "lora_B" in name)
    assert all(t.std() > 0 for name, t in tensors.items() if "lora_A" in name)


def test_adapter_loads_in_peft_with_the_same_logprobs(run: dict[str, Any]) -> None:
    from peft import PeftModel

    folder, batch = run["folder"], run["batch"]
    model = PeftModel.from_pretrained(hugging_face(run["model"]), str(folder / "s1" / "adapter"))
    plain = hugging_face(run["model"])
    scored_RS = load_file(folder / "scored.safetensors")["logprobs_RS"]
    changed = 0.0
    for q in range(len(batch.leaf_Q)):
        row, path = int(batch.row_Q[q]), batch.path_index(q)
        tokens = batch.tokens_RS[row, path]
        with torch.no_grad():
            expected, before = reference_logprobs(model, tokens), reference_logprobs(plain, tokens)
        ours = torch.from_numpy(scored_RS[row, path[1:]])
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        changed = max(changed, float((expected - before).abs().max()))
    assert changed > 0.05  # the adapter does something
    assert np.isnan(scored_RS[batch.previous_RS < 0]).all()


def test_first_step_is_torch_adamw_on_peft(run: dict[str, Any]) -> None:
    """Loss, gradients and one AdamW update with clipping, by PEFT and torch on unpacked sequences, from the same identity adapter."""
    from peft import PeftModel

    folder, batch = run["folder"], run["batch"]
    model = PeftModel.from_pretrained(hugging_face(run["model"]), str(folder / "s0" / "adapter"), is_trainable=True)
    loss, total = torch.zeros(()), 0.0
    for q in range(len(batch.leaf_Q)):
        row, path = int(batch.row_Q[q]), batch.path_index(q)
        scored = batch.scored_index_P[batch.scored_offsets_Q[q] : batch.scored_offsets_Q[q + 1]]
        places = np.searchsorted(path, scored)
        new = reference_logprobs(model, batch.tokens_RS[row, path])[places - 1]
        old = torch.from_numpy(batch.logprobs_RS[row, scored])
        weight, advantage = float(batch.sequence_weight_Q[q]), float(batch.sequence_advantage_Q[q])
        loss = loss - weight * advantage * ((new.detach() - old).exp().clamp(0.0, 5.0) * new).sum()
        total += weight * len(places)
    (loss / total).backward()
    assert float(loss) / total == pytest.approx(run["step1"]["metrics"]["loss"], rel=1e-5, abs=1e-6)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
    assert float(norm) == pytest.approx(run["step1"]["metrics"]["grad_norm"], rel=1e-4)
    torch.optim.AdamW([p for _, p in trained], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0).step()
    ours = load_file(folder / "s1" / "adapter" / "adapter_model.safetensors")
    for name, parameter in trained:
        gradient = parameter.grad
        assert gradient is not None
        certain = gradient.abs() > 1e-5  # Adam's first step is the gradient's sign; noise has none
        difference = (torch.from_numpy(ours[name.replace(".default", "")]) - parameter.detach()).abs()
        assert float((difference * certain).max()) < 1e-4, name


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A worker's life with all weights trained: scores and memory, a step, scores, a step against the first as reference."""
    folder = tmp_path_factory.mktemp("full")
    model = tiny("qwen3_moe", folder / "model", dtype="float32")
    batch, path = written(folder, np.random.default_rng(5), "a.safetensors")
    parent = Parent(folder / "process", engine(model, []))
    answers: dict[str, Any] = {"folder": folder, "model": model, "batch": batch, "path": path}
    parent.call("score", batch=path, out=str(folder / "scored-0"))
    answers["memory"] = parent.call("memory")
    answers["step"] = parent.call("train_step", batch=path, config=config(learning_rate=1e-3), out=str(folder / "s1"))
    parent.call("score", batch=path, out=str(folder / "scored-1"))
    answers["again"] = parent.call(
        "train_step",
        batch=path,
        config=config(kl_coef=0.5, learning_rate=1e-3),
        out=str(folder / "s2"),
        reference=str(folder / "s1"),
    )
    parent.channel.close()
    answers["left"] = parent.process.wait(30)
    return answers


def test_full_weights_are_exported_as_they_are_used(full: dict[str, Any]) -> None:
    """The folder that a step leaves behind loads in transformers and gives the trainer's logprobs."""
    batch, folder = full["batch"], full["folder"]
    assert {"model/config.json", "trainer/optimizer.safetensors"} <= set(full["step"]["files"])
    # The reference is the present step.
    assert full["again"]["metrics"]["kl_reference"] == pytest.approx(0.0, abs=1e-6)
    scored_RS, before, after = (
        load_file(folder / "scored-1")["logprobs_RS"],
        hugging_face(full["model"]),
        hugging_face(folder / "s1" / "model"),
    )
    changed = 0.0
    for q in range(len(batch.leaf_Q)):
        row, places = int(batch.row_Q[q]), batch.path_index(q)
        with torch.no_grad():
            expected = reference_logprobs(after, batch.tokens_RS[row, places])
            changed = max(
                changed, float((expected - reference_logprobs(before, batch.tokens_RS[row, places])).abs().max())
            )
        torch.testing.assert_close(torch.from_numpy(scored_RS[row, places[1:]]), expected, rtol=1e-5, atol=1e-5)
    assert changed > 0.01


def test_leaves_with_its_parent(full: dict[str, Any]) -> None:
    assert full["left"] == 0


@pytest.mark.usefixtures("groups")
def test_b6_a_reference_of_all_weights_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    """Anonymous memory while a step's weights are swapped in: no more than a few of its tensors, never all of them."""
    from lockstep.config.megatron import Parallel
    from lockstep.engine import state as sessions
    from lockstep.engine.state import open_trainer, reference_weights, save_step
    from lockstep.trainer.protocol import EngineConfig

    model = tiny(
        "qwen3", tmp_path / "model", vocab_size=20_000, hidden_size=128, num_hidden_layers=8, intermediate_size=4096
    )
    trainer = open_trainer(EngineConfig(str(model), Parallel()))
    save_step(trainer, tmp_path / "s1")
    expected = [bucket.weights.clone() for bucket in trainer.optimizer.buckets]
    for bucket in trainer.optimizer.buckets:
        bucket.weights.zero_()
    total = 4 * sum(int(np.prod(shape)) for shape in trainer.shapes.values())
    largest = 4 * max(int(np.prod(shape)) for shape in trainer.shapes.values())
    assert total > 5 * largest
    looked: list[int] = []
    read, start = sessions.Masters.__getitem__, anonymous_bytes()

    def watched(masters: Any, name: str) -> torch.Tensor:
        looked.append(anonymous_bytes())
        return read(masters, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions.Masters, "__getitem__", watched)
        with reference_weights(trainer, tmp_path / "s1"):
            looked.append(anonymous_bytes())
            assert all(torch.equal(b.weights, e) for b, e in zip(trainer.optimizer.buckets, expected, strict=True))
    assert len(looked) > 8
    assert max(looked) - start < 2 * largest


def anonymous_bytes() -> int:
    """What this process holds of the host's memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024  # pyright: ignore[reportOptionalSubscript]


REFUSED: dict[str, dict[str, Any]] = {
    "train_step": {"batch": "", "config": config(), "out": "nowhere"},
    "save": {"out": "nowhere"},
    "load": {"step_dir": "nowhere"},
}


def test_one_that_only_scores_holds_the_weights_and_no_more(tmp_path: Path, full: dict[str, Any]) -> None:
    """The same log-probabilities, in memory for one copy of the weights; whatever would change or publish them is refused."""
    batch = full["path"]
    parent = Parent(tmp_path / "process", engine(full["model"], targets=[]) | {"trains": False})
    parent.call("score", batch=batch, out=str(tmp_path / "scores"))
    allocated = parent.call("memory")["device_storages"]
    for verb, args in REFUSED.items():
        reply = parent.ask(verb, **{name: batch if name == "batch" else value for name, value in args.items()})
        assert reply["error"]["type"] == "ConfigError", reply
        assert "was started to score only" in reply["error"]["message"]
    assert parent.close() == 0
    scores, expected = (load_file(place)["logprobs_RS"] for place in (tmp_path / "scores", full["folder"] / "scored-0"))
    np.testing.assert_array_equal(scores, expected)
    # Of five: weights, gradients, masters and two moments.
    assert allocated < full["memory"]["device_storages"] / 4


def test_memory_is_asked_for_before_it_is_taken() -> None:
    from lockstep.engine.parallel.device import free_memory, require_memory
    from lockstep.errors import TrainerError

    require_memory(free_memory() // 2, "half of it")
    with pytest.raises(TrainerError, match=r"no free memory: a model needs .* GiB"):
        require_memory(2 * free_memory() + 2**40, "a model")


def test_step_counts_tokens(run: dict[str, Any]) -> None:
    batch = run["batch"]
    metrics = run["step1"]["metrics"]
    assert metrics["tokens"] == (batch.nodes_RS >= 0).sum()
    assert metrics["tokens_scored"] == sum(len(scored_row(batch, r).index_N) for r in range(batch.rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "/nowhere"}, "/nowhere"),
        ({"lora": {"rank": 8, "alpha": 16, "targets": ["q_proj", "nose"]}}, "nose"),
        ({"parallel": {"tensor": 2}}, "2"),
        ({"speed": 1}, "speed"),
    ],
)
def test_bad_start_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = tiny("qwen3", tmp_path / "model")
    parent = Parent(tmp_path / "process", engine(model) | change)
    error = parent.ready["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"].endswith("Error")
    assert parent.process.wait(60) != 0


@pytest.mark.distributed
def test_one_failing_rank_does_not_hang_the_others(tmp_path: Path) -> None:
    """Two ranks, one killed inside a verb's wait: the parent gets an end, not silence."""
    rng = np.random.default_rng(0)
    model = tiny("qwen3", tmp_path / "model")
    _, path = written(tmp_path, rng, "a.safetensors", data=2, row_length=32)
    parent = Parent(tmp_path / "process", engine(model, data=2), processes=2)
    assert parent.call("train_step", batch=path, config=config(), out=str(tmp_path / "s1"))["metrics"]["rows"] >= 2
    failing = parent.ask("train_step", batch=str(tmp_path / "none"), config=config(), out=str(tmp_path / "s2"))
    assert failing["error"]["message"]
    assert parent.call("score", batch=path, out=str(tmp_path / "scored"))["rows"] >= 2
    children = Path(f"/proc/{parent.process.pid}/task/{parent.process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert parent.process.wait(60) != 0


def test_sequence_helper_is_honest() -> None:
    """The made-up batches really score only what was sampled."""
    made = sequence("a", [5, 6, 7, 8], 2, np.random.default_rng(0))
    assert made.loss_mask_S.tolist() == [False, False, True, True]
