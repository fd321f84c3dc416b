"""A run on bytes, from text to its checkpoint: the cache's subprocess, denoising, the model, resume, evaluation."""

from pathlib import Path

import pytest
from tiny_run import CONFIG, run, tiny_model

from vikhr_t5.data.byte_vocabulary import ByteVocabulary
from vikhr_t5.data.pipeline import DatasetConfig, open_dataset
from vikhr_t5.data.vocabulary import load_vocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model.network import Transformer
from vikhr_t5.train import optimizers
from vikhr_t5.train.checkpoints import check_vocabulary
from vikhr_t5.train.state import EncoderDecoderModel

TASKS = """
import functools
import seqio
from tasks import settings
from tasks.preprocessors import Denoise
from vikhr_t5.data.sources import TextSource

seqio.TaskRegistry.add(
    "documents_of_bytes",
    source=TextSource({{"train": {text!r}}}),
    preprocessors=[
        functools.partial(seqio.preprocessors.rekey, key_map={{"targets": "text"}}),
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        Denoise("span_corruption"),
    ],
    output_features=settings.output_features(),
)
"""


@pytest.mark.slow
def test_a_run_on_bytes_takes_steps_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = Path(__file__).parents[2] / "tasks" / "demo_data" / "ru.txt"
    (tmp_path / "pages.txt").write_text("\n\n".join(demo.read_text(encoding="utf-8").split("\n\n")[:40]))
    (tmp_path / "tasks_of_bytes.py").write_text(TASKS.format(text=str(tmp_path / "pages.txt")))
    config = DatasetConfig(
        "documents_of_bytes", {"inputs": 64, "targets": 24}, "train", 8, seed=0, module="tasks_of_bytes",
        cache_dir="cache", num_workers=0,
    )  # fmt: skip
    vocabulary = ByteVocabulary()
    dataset = open_dataset(config, vocabulary)
    model = EncoderDecoderModel(Transformer(CONFIG), vocabulary, vocabulary, optimizers.Adafactor())
    assert run(tmp_path / "run", 2, model=model, dataset=dataset, evaluate=False) == 2
    assert model.module.config.vocab_size == 384
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "2"):
        assert [path.name for path in (folder / "vocabulary").iterdir()] == ["vocabulary.json"]
        assert load_vocabulary(folder / "vocabulary").fingerprint() == vocabulary.fingerprint()
    assert run(tmp_path / "run", 4, model=model, dataset=dataset, evaluate=False) == 4
    with pytest.raises(UserError, match=r"another vocabulary than .*: use byte_vocabulary\.ByteVocabulary"):
        check_vocabulary(tmp_path / "run" / "checkpoints" / "4", tiny_model().vocabulary)
