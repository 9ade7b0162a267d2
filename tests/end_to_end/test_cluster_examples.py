"""The examples for clusters: fields of Kubeflow Trainer and SkyPilot, and the commands that they run."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.documents import ROOT
from utils.engines.shards import parse_shard

FOLDER = ROOT / "example/cluster"
CONFIG = "example/icd_7b_8gpus.yaml"

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def fields(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the schema of a mapping with these fields and no other."""
    properties = required | optional
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def items(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


ENV = items(fields({"name": TEXT}, value=TEXT))
MOUNTS = items(fields({"name": TEXT, "mountPath": TEXT}, readOnly={"type": "boolean"}, subPath=TEXT))
VOLUMES = items(
    fields(
        {"name": TEXT},
        persistentVolumeClaim=fields({"claimName": TEXT}, readOnly={"type": "boolean"}),
        emptyDir=fields({}, medium=TEXT, sizeLimit=TEXT),
    )
)
CONTAINERS = items(fields({"name": TEXT}, env=ENV, volumeMounts=MOUNTS))
POD = fields({}, containers=CONTAINERS, volumes=VOLUMES, nodeSelector=TEXTS, terminationGracePeriodSeconds=COUNT)
JOBS = items(fields({"name": TEXT}, template=fields({}, spec=fields({}, template=fields({}, spec=POD)))))
# What the example uses of the custom resource trainer.kubeflow.org/v1alpha1, as of Kubeflow Trainer 2.3.
TRAINJOB = fields(
    {
        "apiVersion": {"const": "trainer.kubeflow.org/v1alpha1"},
        "kind": {"const": "TrainJob"},
        "metadata": fields({"name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}}),
        "spec": fields(
            {"runtimeRef": fields({"name": TEXT}, kind=TEXT, apiGroup=TEXT)},
            trainer=fields(
                {},
                image=TEXT,
                command=items(TEXT),
                args=items(TEXT),
                env=ENV,
                numNodes=COUNT,
                numProcPerNode=COUNT,
                resourcesPerNode=fields({}, requests=TEXTS, limits=TEXTS),
            ),
            runtimePatches=items(
                fields(
                    {"manager": TEXT},
                    trainingRuntimeSpec=fields({}, template=fields({}, spec=fields({}, replicatedJobs=JOBS))),
                )
            ),
        ),
    }
)
# The fields of SkyPilot's documentation that the example uses.
SKYPILOT = fields(
    {"run": TEXT},
    name=TEXT,
    workdir=TEXT,
    num_nodes=COUNT,
    resources=fields({}, infra=TEXT, accelerators={"type": "string", "pattern": r"^[A-Z0-9-]+:\d+$"}),
    volumes=TEXTS,
    envs=TEXTS,
    setup=TEXT,
)


def example(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "schema"), [("trainjob.yaml", TRAINJOB), ("skypilot.yaml", SKYPILOT)])
def test_examples_have_the_fields_of_their_tools(name: str, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema).validate(example(name))


def run_script(script: list[str], folder: Path, **environment: str) -> list[str]:
    """Return the arguments with which a script starts `python` or `torchrun`."""
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("python", "torchrun"):
        stub = folder / ".venv/bin" / name
        stub.write_text("#!/usr/bin/env bash\nprintf '%q ' \"$@\"\n")
        stub.chmod(0o755)
    path = f"{folder / '.venv/bin'}:{os.environ['PATH']}"
    done = subprocess.run(script, cwd=folder, env={"PATH": path} | environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return shlex.split(done.stdout)


def test_each_task_of_the_slurm_array_answers_its_share(tmp_path: Path) -> None:
    options = ["--run", "runs/icd v1", "--notes", "notes.jsonl", "--out", "predictions.jsonl"]
    shards = []
    for task in (5, 6, 7):
        array = {"ID": str(task), "MIN": "5", "COUNT": "3"}
        environment = {f"SLURM_ARRAY_TASK_{key}": value for key, value in array.items()}
        script = ["bash", str(FOLDER / "predict.sbatch"), *options]
        *arguments, shard = run_script(script, tmp_path / str(task), **environment)
        assert arguments == ["-m", "utils.predict_icd10", *options, "--shard"]
        shards.append(parse_shard(shard))
    assert sorted(number for shard in shards for number in shard.of(list(range(10)))) == list(range(10))


def test_both_nodes_train_the_same_configuration(tmp_path: Path) -> None:
    nodes = {"NUM_NODES": "2", "NUM_GPUS_PER_NODE": "8", "NODE_RANK": "1", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment = {f"SKYPILOT_{key}": value for key, value in nodes.items()}
    arguments = run_script(["bash", "-euc", example("skypilot.yaml")["run"]], tmp_path, **environment)
    expected = "--nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr 10.0.0.1 --master-port 29400"
    assert arguments == [*expected.split(), "-m", "train", CONFIG]
    trainer = example("trainjob.yaml")["spec"]["trainer"]
    assert trainer["args"][0].endswith(f"exec torchrun -m train {CONFIG}")
    settings = yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))
    assert settings["resume"] == "auto"


def test_every_example_is_in_the_list_of_recipes() -> None:
    listed = (ROOT / "example/README.md").read_text(encoding="utf-8")
    assert [path.name for path in FOLDER.iterdir() if f"(cluster/{path.name})" not in listed] == []
