"""A model on bytes goes to Hugging Face and back: ByT5's files, the same logits, tokens and sentinels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, ByT5Tokenizer

from conversion import convert, verify
from conversion.stored import MemoryModel, arrays
from vikhr_t5.data.vocabulary import ByteVocabulary

Make = Callable[..., MemoryModel]


def test_a_model_on_bytes_is_byt5_to_transformers(make_model: Make, tmp_path: Path) -> None:
    vocabulary = ByteVocabulary()
    model = make_model("v1.1", vocab_size=384, num_decoder_layers=1)
    model.vocabulary = vocabulary
    convert.write_model(model, tmp_path / "hf", "hf")
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "hf"), ByT5Tokenizer)
    assert not {"spiece.model", "tokenizer.json"} & {path.name for path in (tmp_path / "hf").iterdir()}
    measured = verify.measure(model, tmp_path / "hf", verify.LINES[:3])
    assert all(measured.checks().values()), measured
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"{vocabulary.size} ids" in card
    assert "spiece" not in card
    assert f"<extra_id_{vocabulary.first_sentinel - vocabulary.last_sentinel}>`" in card
    convert.write_model(convert.open_model(tmp_path / "hf", "hf"), tmp_path / "back", "vikhr")
    back = convert.open_model(tmp_path / "back", "vikhr")
    assert back.vocabulary is not None
    assert back.vocabulary.fingerprint() == vocabulary.fingerprint()
    assert all(np.array_equal(back.read(*array), model.read(*array)) for array in arrays(model.config))
