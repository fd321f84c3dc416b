"""What we export, in transformers 4.57: in an environment of its own, which `make test-slow` builds."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers

from conversion import convert, verify
from conversion.huggingface import HuggingFaceModel
from conversion.stored import MemoryModel, load
from vikhr_t5.model import network

Make = Callable[..., MemoryModel]
PYTHON = Path(__file__).resolve().parents[2] / ".venv-transformers4" / "bin" / "python"
# argv: folder, arrays to read, arrays to write. The model is saved again beside the folder.
WORKER = """
import sys, json, numpy, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
folder, given, answer = sys.argv[1:]
arrays = {name: torch.tensor(value, dtype=torch.long) for name, value in numpy.load(given).items() if name != "lines"}
lines = json.loads(open(given + ".json").read())
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
with torch.inference_mode():
    inputs = dict(input_ids=arrays["inputs"], attention_mask=arrays["inputs"] > 0)
    logits = model(**inputs, decoder_input_ids=arrays["shifted"]).logits
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=1)[:, 1:]
ids = [i for line in lines for i in tokenizer(line).input_ids]
numpy.savez(answer, logits=logits.numpy(), generated=generated.numpy(), ids=ids)
model.save_pretrained(folder + "-4")
tokenizer.save_pretrained(folder + "-4")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-transformers4: make test-slow builds it"),
]


def ask(folder: Path, inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    given, answer = folder.with_suffix(".given.npz"), folder.with_suffix(".answer.npz")
    np.savez(given, inputs=inputs, shifted=np.pad(targets[:, :-1], ((0, 0), (1, 0))))
    Path(f"{given}.json").write_text(json.dumps(verify.LINES))
    subprocess.run([PYTHON, "-c", WORKER, folder, given, answer], check=True, capture_output=True, text=True)
    with np.load(answer) as stored:
        return dict(stored)


@pytest.mark.parametrize(("variant", "fields"), [("v1.0", {}), ("v1.1", {}), ("umT5", {}), ("umT5", {"num_heads": 5})])
def test_transformers_4_computes_the_same_and_what_it_saves_is_read(
    make_model: Make, tmp_path: Path, variant: str, fields: dict
) -> None:
    model = make_model(variant, **fields)
    vocabulary = model.vocabulary
    assert vocabulary is not None
    inputs = np.array([[7, 5, 9, 30, 1], [8, 1, 0, 0, 0]], np.int32)
    targets = np.array([[4, 11, 1], [6, 1, 0]], np.int32)
    convert.write_model(model, tmp_path / "out", "hf")
    theirs = ask(tmp_path / "out", inputs, targets)
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    ours = np.asarray(network.Transformer(model.config).apply({"params": load(model)}, inputs, shifted, targets))
    np.testing.assert_allclose(theirs["logits"][targets > 0], ours[targets > 0], atol=1e-4)
    newer = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    generated = verify.generate(newer, inputs, 12)
    np.testing.assert_array_equal(theirs["generated"], generated[:, : theirs["generated"].shape[1]])
    assert theirs["ids"].tolist() == [i for line in verify.LINES for i in [*vocabulary.encode(line), vocabulary.eos_id]]
    assert verify.same_arrays(model, HuggingFaceModel(tmp_path / "out-4", vocabulary))


def test_what_5_saved_of_an_untied_model_4_reads_as_tied(make_model: Make, tmp_path: Path) -> None:
    """The documented defect: 5.x writes "tie_word_embeddings": true of every T5, which 4.x believes. We do not."""
    model = make_model("v1.1")
    inputs, targets = np.array([[7, 5, 9, 30, 1]], np.int32), np.array([[4, 11, 1]], np.int32)
    convert.write_model(model, tmp_path / "out", "hf")
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tmp_path / "out" / name, tmp_path / "again")  # 4.x cannot load the tokenizer that 5.x saves
    right = ask(tmp_path / "out", inputs, targets)["logits"]
    assert np.abs(ask(tmp_path / "again", inputs, targets)["logits"] - right).max() > 0.1
    again = HuggingFaceModel(tmp_path / "again", model.vocabulary)
    assert verify.same_arrays(model, again)
    convert.write_model(again, tmp_path / "mended", "hf")
    np.testing.assert_allclose(ask(tmp_path / "mended", inputs, targets)["logits"], right, atol=1e-6)
