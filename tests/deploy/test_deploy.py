"""Manifests have no field that Kubernetes does not know, and say what the documents say."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCHEMAS = yaml.safe_load(Path(__file__).with_name("schemas.yaml").read_text())
MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))
PLAIN = {
    "string": str,
    "integer": int,
    "boolean": bool,
    "number_or_text": (int, str),
    "map": dict,
}


def flaws(value: Any, schema: Any, where: str) -> list[str]:
    """What of a manifest a schema does not allow."""
    if isinstance(schema, str) and schema not in PLAIN:
        schema = SCHEMAS[schema]
    if isinstance(schema, list):
        return [] if value in schema else [f"{where}: {value!r} is not one of {schema}"]
    if isinstance(schema, str):
        fits = isinstance(value, PLAIN[schema]) and (schema == "boolean" or value is not True)
        return [] if fits else [f"{where}: {value!r} is no {schema}"]
    kind = list if "each" in schema else dict
    if not isinstance(value, kind):
        return [f"{where}: {value!r} is no {kind.__name__}"]
    if kind is list:
        found = [flaws(each, schema["each"], f"{where}.{n}") for n, each in enumerate(value)]
        return [*itertools.chain(*found)]
    fields = {name.rstrip("!"): of for name, of in schema.items()}
    due = [name[:-1] for name in schema if name[-1] == "!"]
    missing = [f"{where}.{name} is missing" for name in due if name not in value]
    unknown = [f"{where}.{name} is not known" for name in value if name not in fields]
    inner = [flaws(value[k], fields[k], f"{where}.{k}") for k in value if k in fields]
    return [*missing, *unknown, *itertools.chain(*inner)]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_one_that_kubernetes_takes(path):
    manifest = read(path)
    assert flaws(manifest, manifest["kind"], manifest["kind"]) == []


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (lambda spec: spec.update(backoffLimit="none"), "'none' is no integer"),
        (lambda spec: spec.update(backOffLimit=1), "backOffLimit is not known"),
        (lambda spec: spec.pop("template"), "template is missing"),
        (lambda spec: spec["podFailurePolicy"]["rules"][0].update(action="Stop"), "'Stop' is not"),
    ],
)
def test_a_mistake_is_found(change, flaw):
    manifest = read(ROOT / "deploy" / "job.yaml")
    change(manifest["spec"])
    (found,) = flaws(manifest, "Job", "Job")
    assert flaw in found


def test_every_kind_of_manifest_is_there():
    assert [read(path)["kind"] for path in MANIFESTS] == ["Job", "JobSet", "TrainJob"]


def test_no_pod_starts_again_what_would_be_of_no_use():
    job = read(ROOT / "deploy" / "job.yaml")["spec"]
    jobset = read(ROOT / "deploy" / "jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    for spec in (job, jobset):
        rule = spec["podFailurePolicy"]["rules"][0]
        assert rule["action"] == "FailJob"
        assert rule["onExitCodes"]["values"] == [2, 65]
        (container,) = spec["template"]["spec"]["containers"]
        assert rule["onExitCodes"]["containerName"] == container["name"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_what_the_image_copies_is_there():
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name
