"""Evidence: the short form of reports, kept with the library, one file for each family.

A record says what passed on which device, with which versions and of which sources. It is stale
when the code that the family's numbers depend on has changed since; docstrings, comments and
imports don't count.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError
from lockstep.models.registry import get_model_support_spec_by_key
from lockstep.models.spec import ModelSupportSpec
from lockstep.process.durable import write_whole
from lockstep.validate.figures import NOT_APPLICABLE, NOT_PROVEN, PASSED

_PACKAGE = Path(__file__).resolve().parents[1]
_SHARED = ("models/contract.py", "models/layout_rules.py", "models/config.py", "engine/model.py", "engine/build.py")
Record = dict[str, Any]


def evidence_folder() -> Path | None:
    """Inside an installed wheel, or at the top of a source checkout; None: there is none."""
    for folder in (_PACKAGE / "_evidence", _PACKAGE.parents[1] / "evidence"):
        if folder.is_dir():
            return folder
    return None


def sources_of(family: str) -> list[Path]:
    """The files that decide a family's numbers."""
    folder = _PACKAGE / "models" / get_model_support_spec_by_key(family).family
    layers = sorted((_PACKAGE / "engine" / "layers").glob("*.py"))
    return [*sorted(folder.glob("*.py")), *(_PACKAGE / name for name in _SHARED), *layers]


def digest_of(family: str) -> str:
    """SHA-256 of the sources' code."""
    digest = hashlib.sha256()
    for path in sources_of(family):
        digest.update(path.name.encode() + b"\0" + _code(path.read_text(encoding="utf-8")).encode() + b"\0")
    return digest.hexdigest()


def _code(source: str) -> str:
    """The syntax tree without docstrings and imports."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [entry for entry in body if not _silent(entry)]  # pyright: ignore[reportAttributeAccessIssue]
    return ast.dump(tree)


def _silent(node: ast.AST) -> bool:
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return text or isinstance(node, ast.Import | ast.ImportFrom)


def record_of(report: Mapping[str, Any]) -> Record:
    """The short form of a report: for each stage its status, its limited figures and its speeds."""
    stages = {}
    for entry in report["stages"]:
        kept_figures = [f for f in entry["figures"] if f["limit"] is not None or f["unit"] == "tokens/s"]
        figures = {f["name"]: [_value(f), f["limit"]] for f in kept_figures}
        stages[entry["name"]] = {"status": entry["status"], "seconds": entry["seconds"], "figures": figures}
    kept = ("model", "kind", "layers", "device", "seed", "date", "versions", "machine", "complete")
    named = {"model": _name(report["model"]), "sources": digest_of(report["family"])}
    return {name: report[name] for name in kept} | named | {"stages": stages}


def _name(model: str) -> str:
    """A folder or file of one machine by its last name."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def _value(entry: Mapping[str, Any]) -> float:
    return float(f"{entry[entry['limited']]:.3g}")


def read_evidence(family: str) -> list[Record]:
    """The family's records; none where nothing was kept. Raises ConfigError for a damaged file."""
    folder = evidence_folder()
    path = folder / f"{family}.json" if folder else None
    if path is None or not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["records"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}): run `lockstep validate {family} --evidence {folder}`"
        ) from None


def add_record(report: Mapping[str, Any], folder: Path) -> Path:
    """Put the report into the family's file, in the place of an earlier one of the same model and
    device. Of the same sources and versions, that one's stages stay where this report has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['family']}.json"
    records: list[Record] = json.loads(path.read_text(encoding="utf-8"))["records"] if path.is_file() else []
    new = record_of(report)
    same = ("model", "kind", "device", "layers")
    for old in [old for old in records if all(old[name] == new[name] for name in same)]:
        records.remove(old)
        if (old["sources"], old["versions"]) == (new["sources"], new["versions"]):
            missing = [name for name, stage in new["stages"].items() if stage["status"] == NOT_PROVEN]
            new["stages"] |= {name: old["stages"][name] for name in missing if name in old["stages"]}
    new["complete"] = all(stage["status"] in (PASSED, NOT_APPLICABLE) for stage in new["stages"].values())
    records.append(new)
    return write_whole(path, json.dumps({"family": report["family"], "records": records}, indent=1) + "\n")


def passed_stages(records: list[Record]) -> set[str]:
    """Stages that passed in a record of today's sources."""
    return {name for record in records for name, stage in record["stages"].items() if stage["status"] == PASSED}


def unbacked(spec: ModelSupportSpec) -> Iterator[str]:
    """What the registry's entry claims without evidence, one sentence each."""
    records = read_evidence(spec.key)
    if not records:
        yield f"{spec.key} has no evidence: run `lockstep validate {spec.key} --evidence evidence`"
        return
    current = [record for record in records if record["sources"] == digest_of(spec.key)]
    if not current:
        yield f"the evidence of {spec.key} is older than its sources: run `lockstep validate {spec.key} --evidence evidence`"
        return
    if spec.native_vllm_lora_status == "validated" and "native_vllm_lora" not in passed_stages(current):
        yield f"{spec.key} claims adapters in vLLM, and no evidence of today's sources has native_vllm_lora passed"
    for record in current:
        for name, stage in record["stages"].items():
            if stage["status"] == "failed":
                yield f"{spec.key}: {name} failed on {record['device']}, {record['date']}"


def summary_of(family: str) -> str:
    """One phrase for `lockstep models`."""
    phrases = []
    for record in read_evidence(family):
        stages = record["stages"].values()
        counted = sum(stage["status"] in (PASSED, NOT_APPLICABLE) for stage in stages)
        stale = "" if record["sources"] == digest_of(family) else ", older than its sources"
        phrases.append(
            f"{record['model']} on {record['device']}, {counted} of {len(stages)} stages, {record['date']}{stale}"
        )
    return "; ".join(phrases) or "none yet"
