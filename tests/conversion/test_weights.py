"""Models that transformers made and saved itself, in every file format that it has had; and pickles with code."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from conversion import convert, verify
from conversion.huggingface import HuggingFaceModel
from conversion.stored import load
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model import network

SHAPE = {
    "d_model": 32,
    "num_heads": 3,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "decoder_start_token_id": 0,
}


def saved(folder: Path, kind: str, rows: int, **fields: Any) -> Any:
    """A random model of transformers' own, saved by it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=rows, **SHAPE, **fields)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    if not config.tie_word_embeddings or fields.get("own_head"):
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.4))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("t5", {"feed_forward_proj": "relu"}),
        ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "own_head": True}),
        ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),  # a head that 5.x tied, unscaled
        ("mt5", {"own_head": True}),
        ("umt5", {"own_head": True}),
        ("umt5", {}),
    ],
)
def test_what_transformers_saved_gives_its_logits(tmp_path: Path, unigram: Vocabulary, kind: str, fields: dict) -> None:
    theirs = saved(tmp_path, kind, unigram.padded_size, **fields)
    model = HuggingFaceModel(tmp_path, unigram)
    inputs = np.array([[7, 5, 9, 30, 1], [8, 1, 0, 0, 0]], np.int32)
    targets = np.array([[4, 11, 1], [6, 1, 0]], np.int32)
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    ours = network.Transformer(model.config).apply({"params": load(model)}, inputs, shifted, targets)
    expected = verify.their_logits(theirs, inputs, targets)
    np.testing.assert_allclose(np.asarray(ours)[targets > 0], expected[targets > 0], atol=1e-4)
    convert.write_model(model, tmp_path / "again", "hf")
    assert verify.same_arrays(model, HuggingFaceModel(tmp_path / "again"))


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_files_hold_the_same(tmp_path: Path, unigram: Vocabulary, legacy: bool) -> None:
    theirs = saved(tmp_path / "safe", "t5", unigram.padded_size)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "safe" / "config.json").read_bytes())
    state = {name: value.to(torch.bfloat16) for name, value in theirs.state_dict().items()}
    extra = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # as in the first T5 files
    state[extra] = torch.zeros(32, 3, dtype=torch.bfloat16)
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    model = HuggingFaceModel(tmp_path / "bin", unigram)
    assert model.dtype == "bfloat16"
    assert verify.same_arrays(model, HuggingFaceModel(tmp_path / "safe", unigram))


class Code:
    """Runs `touch` when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, unigram: Vocabulary) -> None:
    saved(tmp_path, "t5", unigram.padded_size)
    (tmp_path / "model.safetensors").unlink()
    file, proof = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    for content in ({"shared.weight": Code(proof)}, Code(proof)):
        torch.save(content, file)
        with pytest.raises(UserError, match="nothing in it was run"):
            HuggingFaceModel(tmp_path, unigram)
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="nothing in it was run"):
            HuggingFaceModel(tmp_path, unigram)
    assert not proof.exists()
    pickle.loads(file.read_bytes())
    assert proof.exists(), "the pickle does what it is meant to"
    torch.save({"shared.weight": [1, 2]}, file)
    with pytest.raises(UserError, match="something else than tensors"):
        HuggingFaceModel(tmp_path, unigram)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="not a file of tensors alone"):
        HuggingFaceModel(tmp_path, unigram)


def test_a_copy_that_differs_is_refused(tmp_path: Path, unigram: Vocabulary) -> None:
    theirs = saved(tmp_path, "t5", unigram.padded_size)
    (tmp_path / "model.safetensors").unlink()
    state = theirs.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] * 2
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lm_head\.weight is not shared\.weight"):
        HuggingFaceModel(tmp_path, unigram)
