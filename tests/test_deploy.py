"""The launch examples: their scripts are bash, their commands are ours, their numbers agree.

Checked besides, by hand: `sbatch --test-only`, and two nodes of a Slurm on one machine (a signal, requeued, finished);
`kubernetes-validate --strict` against the published schemas.
"""

import re
import shlex
import subprocess
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
