"""The examples for clusters: what they start is what accelerate takes, and a run of several machines to hf_lsam.

They are run by the shell as they stand; the cluster's commands and the launcher are stand-ins that say what they got.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from launch import ROOT

from hf_lsam.identity import Identity
from recipes.causal_lm import train as causal_lm
from recipes.common.configuration import parse_configuration

CLUSTERS = ROOT / "docs/clusters"
MACHINES, GPUS = 2, 8

# What the cluster's commands do: srun starts a process a machine, with its number.
SAY = 'python3 -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"'
COMMANDS = {
    "accelerate": SAY,
    "python": SAY,
    "scontrol": 'test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n"',
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
}


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((CLUSTERS / name).read_text()))


def slurm() -> list[tuple[str, dict[str, str]]]:
    """The shell's text and the cluster's variables; srun counts the machines."""
    variables = {"SLURM_GPUS_ON_NODE": GPUS, "SLURM_JOB_NUM_NODES": MACHINES, "SLURM_JOB_ID": 31234}
    return [((CLUSTERS / "slurm.sbatch").read_text(), {**variables, "SLURM_JOB_NODELIST": "node[7-8]"})]


def skypilot() -> list[tuple[str, dict[str, str]]]:
    (task,) = documents("skypilot.yaml")
    assert task["num_nodes"] == MACHINES
    assert task["resources"]["accelerators"].endswith(f":{GPUS}")
    same = {"SKYPILOT_NUM_NODES": MACHINES, "SKYPILOT_NUM_GPUS_PER_NODE": GPUS, "SKYPILOT_TASK_ID": "sky-1_lsam-1"}
    same["SKYPILOT_NODE_IPS"] = "10.0.0.7\n10.0.0.8"
    return [(task["run"], {**same, "SKYPILOT_NODE_RANK": rank}) for rank in range(MACHINES)]


def kubernetes() -> list[tuple[str, dict[str, str]]]:
    service, job = documents("kubernetes.yaml")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (MACHINES, MACHINES)
    assert service["metadata"]["name"] == pod["subdomain"]  # or the first pod has no name
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == GPUS
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert container["command"] == ["bash", "-c"]
    return [(container["args"][0], {**given, "JOB_COMPLETION_INDEX": rank}) for rank in range(MACHINES)]


def said_by(script: str, variables: dict[str, str | int], folder: Path) -> list[list[str]]:
    """What the stand-ins got, each time, when the shell runs a script with these variables."""
    for name, text in COMMANDS.items():
        command = folder / name
        command.write_text(f"#!/bin/bash\n{text}\n")
        command.chmod(0o755)
    environment = {name: str(value) for name, value in variables.items()}
    environment["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    (folder / "script").write_text(script)
    command = ["bash", "-eu", folder / "script"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("cluster", "first_machine"), [(slurm, "node7"), (skypilot, "10.0.0.7"), (kubernetes, "lsam-0.lsam")]
)
def test_a_launcher_a_machine_that_makes_one_run(tmp_path, monkeypatch, cluster, first_machine):
    launched = [words for text, variables in cluster() for words in said_by(text, variables, tmp_path)]
    ports = set()
    for rank, (launch, *words) in enumerate(launched):
        assert launch == "launch"
        options = launch_command_parser().parse_args(words)
        assert (options.num_machines, options.machine_rank) == (MACHINES, rank)
        assert options.num_processes == MACHINES * GPUS
        assert options.multi_gpu
        assert options.max_restarts == 0  # another number is refused on several machines
        assert options.main_process_ip == first_machine
        ports.add(options.main_process_port)
        assert (ROOT / options.training_script).is_file()
        monkeypatch.chdir(ROOT)
        values = parse_configuration(causal_lm.KEYS, options.training_script_args)
        assert values["num_workers"] == MACHINES * GPUS
        # What such a launcher tells the first worker of each machine.
        told = {"WORLD_SIZE": MACHINES * GPUS, "LOCAL_WORLD_SIZE": GPUS, "RANK": rank * GPUS, "LOCAL_RANK": 0}
        for name, value in {**told, "GROUP_RANK": rank, "GROUP_WORLD_SIZE": MACHINES}.items():
            monkeypatch.setenv(name, str(value))
        assert Identity.from_environment() == Identity(rank * GPUS, 0, MACHINES * GPUS, rank, MACHINES, GPUS)
    assert len(launched) == MACHINES
    assert len(ports) == 1
    assert next(iter(ports)) > 1023


def test_a_machine_that_is_queued_again_joins_by_the_same_commands(tmp_path, monkeypatch):
    text = (CLUSTERS / "slurm_requeue.sbatch").read_text()
    variables = {"SLURM_GPUS_ON_NODE": GPUS, "SLURM_ARRAY_JOB_ID": 31234, "SLURM_ARRAY_TASK_ID": 3}
    # They run beside each other.
    relay, launch = sorted(said_by(text, {**variables, "SERVER": "node1:29400", "SECRET": "secret"}, tmp_path))
    folder = "/tmp/lsam-31234-3"
    assert relay[:2] == ["-m", "hf_lsam.server"]
    assert relay[2:] == ["--run_dir", folder, "--connect", "node1:29400", "--secret_file", "secret"]
    options = launch_command_parser().parse_args(launch[1:])
    assert (options.num_machines, options.num_processes, options.multi_gpu) == (1, GPUS, True)
    monkeypatch.chdir(ROOT)
    values = parse_configuration(causal_lm.KEYS, options.training_script_args)
    assert (values["num_workers"], values["server_address"], values["seed"]) == (GPUS, folder, 3)


def test_the_manifest_is_one_that_kubernetes_takes():
    validator = pytest.importorskip("kubernetes_validate")
    for document in documents("kubernetes.yaml"):
        validator.validate(document, validator.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("script", "asked"),
    [
        ("slurm.sbatch", {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8"}),
        ("slurm_requeue.sbatch", {"nodes": "1", "array": "1-4", "gpus-per-node": "8", "requeue": ""}),
    ],
)
def test_sbatch_reads_its_options_before_the_first_command(script, asked):
    lines = (CLUSTERS / script).read_text().splitlines()
    before = lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    given = [line.removeprefix("#SBATCH --").partition("=") for line in before if line.startswith("#SBATCH")]
    options = {name: value for name, _, value in given}
    assert options | asked == options
    assert sum(line.startswith("#SBATCH") for line in lines) == len(options)
