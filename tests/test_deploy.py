"""The launch examples: their scripts are bash, their commands are ours, their numbers agree.

Checked besides, by hand: `sbatch --test-only`, and two nodes of a Slurm on one machine (a signal, requeued, finished);
`kubernetes-validate --strict` against the published schemas.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from vikhr_t5 import cli

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
SBATCH = (DEPLOY / "slurm" / "train.sbatch").read_text()
SERVICE, JOB = yaml.safe_load_all((DEPLOY / "kubernetes" / "train.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
SCRIPTS = {"slurm": SBATCH, "kubernetes": CONTAINER["command"][-1]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_bash_and_start_what_we_have(name):
    subprocess.run(["bash", "-n"], input=SCRIPTS[name], text=True, check=True)
    joined = SCRIPTS[name].replace("\\\n", " ")
    command = re.search(r"vikhr-t5 (train .+)", joined)[1]
    variables = {"PROCESS_COUNT": "4", "JOB_COMPLETION_INDEX": "3", "MODEL_DIR": "/shared/run"}
    for variable, value in variables.items():
        command = command.replace(f"${variable}", value)
    command = command.replace('"$@" 2>&1 | tee "last-$SLURM_JOB_ID.log"', "--gin_file=recipes/demo.gin").rstrip(" &")
    flags = cli.parse(shlex.split(command))
    assert flags.multiprocess_gpu or (flags.process_count, flags.process_index) == (4, 3)


@pytest.mark.parametrize(
    ("writes", "status", "expected"),
    [("true", 0, 0), ("false", 0, 3), ("true", 1, 1), ("false", 2, 2), ("signal", 0, 3)],
)
def test_a_pod_ends_with_0_when_this_start_finished(writes, status, expected, tmp_path):
    """Not by what an earlier one wrote, up to fewer TRAIN_STEPS. At SIGTERM vikhr-t5 gets it, and has time to save."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "end", "step": 100, "finished": true}\n')
    stub = tmp_path / "vikhr-t5"
    wait = "trap stop=1 TERM; echo started; until [ $stop ]; do sleep 0.05; done" if writes == "signal" else ""
    line = f'{{"kind": "end", "step": 120, "finished": {"false" if writes == "signal" else writes}}}'
    stub.write_text(f"#!/bin/bash\n{wait}\necho '{line}' >> {metrics}\nexit {status}\n")
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL_DIR": str(tmp_path), "PROCESS_COUNT": "4"}
    environment["JOB_COMPLETION_INDEX"] = "0"
    pod = subprocess.Popen(["bash", "-c", SCRIPTS["kubernetes"]], env=environment, stdout=subprocess.PIPE, text=True)
    if writes == "signal":
        assert pod.stdout.readline() == "started\n"
        time.sleep(0.2)  # until the pod, too, has set its trap
        pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=20) == expected


def test_the_pods_find_each_other():
    count = JOB["spec"]["completions"]
    assert (
        count == JOB["spec"]["parallelism"] == int({e["name"]: e["value"] for e in CONTAINER["env"]}["PROCESS_COUNT"])
    )
    name, subdomain = JOB["metadata"]["name"], POD["subdomain"]
    assert subdomain == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["selector"] == {"job-name": name}
    assert f"--coordinator_address={name}-0.{subdomain}:" in SCRIPTS["kubernetes"]  # pod 0 of an Indexed Job
