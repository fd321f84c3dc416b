"""Evaluation sets in their published schema, of any size, with answers drawn at random; and a tiny T5."""

import json
import random
import re
from pathlib import Path
from typing import Any

from random_params import enlarged_params
from tiny_mistral import lines

from conversion import convert
from conversion.stored import MemoryModel
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.model.config import T5Config

SUBJECTS = tuple(
    re.findall(
        r"subject: (\w+)",
        (Path(__file__).parents[1] / "tasks/benchmarks/ru_mmlu.yaml").read_text(encoding="utf-8"),
    )
)
VOCABULARY = Path(__file__).parent / "reference/vocabulary/ru924.model"
Rows = list[dict[str, Any]]


def xwinograd(count: int, seed: int = 0) -> Rows:
    """Muennighoff/xwinograd, ru."""
    chance, texts = random.Random(seed), [text.split() for text in lines("ru", 4000) if 6 <= len(text.split()) <= 14]
    rows: Rows = []
    for number in range(count):
        words = list(texts[number % len(texts)])
        gap = chance.randrange(1, len(words) - 2)
        option1, option2 = chance.sample(texts[(number + 1) % len(texts)], 2)
        sentence = " ".join([*words[:gap], "_", *words[gap + 1 :]]).replace("__", "_")
        rows.append(
            {"sentence": sentence, "option1": option1, "option2": option2, "answer": str(1 + chance.randrange(2))}
        )
    return rows


def xnli(count: int, seed: int = 0) -> Rows:
    """facebook/xnli, ru."""
    chance, texts = random.Random(seed), [text for text in lines("ru", 4000) if 20 <= len(text) <= 70]
    return [
        {"premise": chance.choice(texts), "hypothesis": chance.choice(texts), "label": chance.randrange(3)}
        for _ in range(count)
    ]


def mmlu(count: int, seed: int = 0) -> Rows:
    """NLPCoreTeam/mmlu_ru: `count` questions of each subject. The subject, which is the name of the set's config on the
    hub, is a column here."""
    chance, texts = random.Random(seed), [text for text in lines("ru", 4000) if 20 <= len(text) <= 70]
    words = [word for text in texts for word in text.split()]
    return [
        {
            "subject": subject,
            "question_en": "What?",
            "choices_en": ["a", "b", "c", "d"],
            "question_ru": chance.choice(texts),
            "choices_ru": chance.sample(words, 4),
            "answer": chance.randrange(4),
        }
        for subject in SUBJECTS
        for _ in range(count)
    ]


def write(folder: Path, **sets: Rows) -> Path:
    """write(tmp_path, xnli_ru=xnli(20), xnli_ru_train=xnli(9, 1)) -> the folder, with a file of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_all(folder: Path, items: int, of_subject: int) -> Path:
    """The three sets of the article, with what their prompts take examples from."""
    return write(
        folder,
        xwinograd_ru=xwinograd(items),
        xnli_ru=xnli(items),
        xnli_ru_train=xnli(30, seed=1),
        ru_mmlu=mmlu(of_subject),
        ru_mmlu_dev=mmlu(5, seed=1),
    )


def tiny_t5(folder: Path, form: str = "hf", seed: int = 0) -> Path:
    """A random T5 v1.1 of 100k parameters, as Hugging Face's folder or as a checkpoint of ours."""
    vocabulary = Vocabulary(str(VOCABULARY), extra_ids=100)
    config = T5Config(
        vocab_size=vocabulary.padded_size, emb_dim=32, num_heads=2, head_dim=16, mlp_dim=64,
        num_encoder_layers=2, num_decoder_layers=2, mlp_activations=("gelu", "linear"), logits_via_embedding=False,
    )  # fmt: skip
    convert.write_model(MemoryModel(enlarged_params(config, seed), config, vocabulary), folder, form)
    return folder
