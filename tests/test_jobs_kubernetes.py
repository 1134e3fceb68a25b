"""The manifest and the image for Kubernetes: what they promise, and that they agree with the code and each other."""

import subprocess
import sys
from typing import Any

import pytest
import yaml

from loraport.clients.errors import BaseModelError, ConfigError, DataError, LoraportError, Shortfall, UsageError
from loraport.train.config import RunConfig
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "deploy"


@pytest.fixture(scope="module")
def documents() -> dict[str, list[dict[str, Any]]]:
    """The objects of the manifest, by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for document in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()):
        found.setdefault(document["kind"], []).append(document)
    return found


@pytest.fixture(scope="module")
def job(documents: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The Job's specification."""
    (found,) = documents["Job"]
    assert found["apiVersion"] == "batch/v1"
    return dict(found["spec"])


@pytest.fixture(scope="module")
def trainer(job: dict[str, Any]) -> dict[str, Any]:
    """Its one container."""
    (found,) = job["template"]["spec"]["containers"]
    return dict(found)


def test_one_gpu_memory_retries_and_a_limit(job: dict[str, Any], trainer: dict[str, Any]) -> None:
    limits = trainer["resources"]["limits"]
    assert limits == {"memory": "32Gi", "nvidia.com/gpu": 1}
    assert (job["backoffLimit"], job["activeDeadlineSeconds"]) == (2, 24 * 3600)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    assert pod["securityContext"]["runAsNonRoot"] and not trainer["securityContext"]["allowPrivilegeEscalation"]


def test_only_what_another_pod_could_change_is_tried_again(job: dict[str, Any], trainer: dict[str, Any]) -> None:
    fail, ignore = job["podFailurePolicy"]["rules"]
    codes = {kind.exit_code for kind in (UsageError, ConfigError, DataError, BaseModelError, Shortfall)}
    assert fail["action"] == "FailJob" and set(fail["onExitCodes"]["values"]) == codes
    assert LoraportError.exit_code not in codes and fail["onExitCodes"]["containerName"] == trainer["name"]
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}


def test_what_is_mounted_is_there(
    job: dict[str, Any], trainer: dict[str, Any], documents: dict[str, list[dict[str, Any]]]
) -> None:
    volumes = {volume["name"]: volume for volume in job["template"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in trainer["volumeMounts"]}
    assert volumes.keys() == mounts.keys() and mounts["shm"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    claims = {document["metadata"]["name"] for document in documents["PersistentVolumeClaim"]}
    assert {volumes[name]["persistentVolumeClaim"]["claimName"] for name in ("cache", "home")} == claims
    assert volumes["config"]["configMap"]["name"] == documents["ConfigMap"][0]["metadata"]["name"]
    variables = {entry["name"]: entry for entry in trainer["env"]}
    assert variables["LORAPORT_HOME"]["value"] == mounts["home"] and variables["HF_HOME"]["value"] == mounts["cache"]
    assert all(
        entry["valueFrom"]["secretKeyRef"]["name"] == "loraport-worker"
        for name, entry in variables.items()
        if name.endswith(("TOKEN", "KEY"))
    ), "no secret stands in the manifest"


def test_the_configuration_is_one_and_its_command_too(
    trainer: dict[str, Any], documents: dict[str, list[dict[str, Any]]]
) -> None:
    config = RunConfig.model_validate(yaml.safe_load(documents["ConfigMap"][0]["data"]["config.yaml"]))
    assert config.name == "support"
    command, *flags = trainer["args"]
    loraport = [sys.executable, "-m", "loraport_cli", command, *flags]
    done = subprocess.run([*loraport, "--no-such-flag"], capture_output=True, text=True, cwd=ROOT)
    assert "no-such-flag" in done.stderr, "all the others are known"
    done = subprocess.run(loraport, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "/config/config.yaml" in done.stderr


def test_the_image_has_what_the_manifest_expects(trainer: dict[str, Any]) -> None:
    lines = (FOLDER / "Containerfile").read_text().splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    named = dict(words)
    assert named["ENTRYPOINT"] == '["loraport"]' and named["USER"] == "1000" and named["COPY"] == ". /opt/loraport"
    assert "requirements/install.py /opt/loraport/.venv" in "\n".join(lines)
    assert "/opt/loraport/.venv/bin:" in named["ENV"] and "LORAPORT_HOME=/loraport HF_HOME=/cache" in named["ENV"]
    left_out = (FOLDER / "Containerfile.dockerignore").read_text().split()
    assert ".git" in left_out and not {"requirements", "train", "clients", "pyproject.toml"} & set(left_out)
    assert trainer["image"].startswith("loraport-worker")
