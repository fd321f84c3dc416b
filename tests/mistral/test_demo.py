"""`make demo-mistral` as a whole; what comes out loads in plain transformers, in a process without our code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vikhr_mistral

SCRIPT = Path(vikhr_mistral.__file__).parent / "demo.sh"
PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
asked = [{"role": "user", "content": "Как это сказать по-русски? Select the file."}]
inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.1, pad_token_id=2)
assert not any(name.startswith(("vikhr", "conversion", "peft")) for name in sys.modules)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
"""


def losses(run: Path, kind: str, task: str | None = None) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if line["kind"] == kind and line.get("task") == task]


@pytest.mark.slow
def test_the_whole_road(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", SCRIPT], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs = tmp_path / "runs" / "demo-mistral"
    assert (runs / "report.html").stat().st_size > 10_000
    report = json.loads((runs / "tokenizer" / "report.json").read_text(encoding="utf-8"))
    assert report["size"] == 40_000
    russian = losses(runs / "pretrain", "eval", "russian")
    assert russian[-1] < russian[0] - 3
    chats = losses(runs / "instruct", "eval", "chats")
    assert chats[-1] < chats[0] - 0.1
    program = Path(sys.executable).parent / "vikhr-mistral"
    question = "Как это сказать по-русски? Select the file.\n"
    answered = subprocess.run(
        [program, "chat", runs / "merged", "--temperature=0", "--max_new_tokens=40"],
        input=question, capture_output=True, text=True, check=True,
    )  # fmt: skip
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, runs / "merged"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert answered.stdout.strip() == plain.stdout.strip() != ""
