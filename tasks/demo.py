"""Tasks on the embedded corpus: the LibreOffice help in Russian and English (tasks/demo_data, MPL-2.0).

    demo_ul2, demo_span_corruption              denoising of the Russian pages
    demo_translate_ru_en, demo_translate_en_ru  paragraphs that both languages have
    demo_complete                               the rest of a Russian paragraph
    demo_restore                                a Russian paragraph that has lost words or letters, or its order
    demo_instructions                           the last four at equal rates

Every task has the splits `train` and `validation`. Whole pages are held out, by a hash of their text, and a paragraph
is held out of the instructions when its page is: what a validation split asks for was in no training split, neither of
the instructions nor of the denoising before them.
"""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf

from tasks import settings
from tasks.preprocessors import Denoise
from vikhr_t5 import text_metrics
from vikhr_t5.data.hashing import text_hash
from vikhr_t5.data.sources import Example, JsonLinesSource, TextSource, held_out

DATA = Path(__file__).parent / "demo_data"
HELD_OUT = 0.05
PAGES, PAIRS = str(DATA / "ru.txt"), str(DATA / "parallel.jsonl")

Instruction = tuple[str, str]  # inputs, targets


# ---- denoising -------------------------------------------------------------------------------------------------------

for name, denoisers in (("demo_ul2", "ul2"), ("demo_span_corruption", "span_corruption")):
    seqio.TaskRegistry.add(
        name,
        source=TextSource({"train": PAGES, "validation": PAGES}, belongs=held_out("text", HELD_OUT)),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            Denoise(denoisers),
        ],
        output_features=settings.output_features(),
    )


# ---- instructions ----------------------------------------------------------------------------------------------------


def translate_ru_en(russian: str, english: str) -> Instruction:
    return f"Переведи на английский: {russian}", english


def translate_en_ru(russian: str, english: str) -> Instruction:
    return f"Переведи на русский: {english}", russian


def complete(russian: str, english: str) -> Instruction | None:
    """The paragraph is cut after 40 to 70% of its words; None for one of fewer than 6."""
    words = russian.split()
    if len(words) < 6:
        return None
    cut = round(len(words) * _random(russian).uniform(0.4, 0.7))
    return f"Продолжи текст: {' '.join(words[:cut])}", " ".join(words[cut:])


def restore(russian: str, english: str) -> Instruction | None:
    """One of three kinds: every fifth word is missing, every sixth letter is, or the words (15 at most) are shuffled;
    None for a paragraph of fewer than 4 words."""
    words, chance = russian.split(), _random(russian)
    if len(words) < 4:
        return None
    target, kind = " ".join(words), chance.randrange(3 if len(words) <= 15 else 2)
    if kind == 0:
        for place in chance.sample(range(len(words)), max(1, len(words) // 5)):
            words[place] = "…"
        return f"Восстанови пропущенные слова: {' '.join(words)}", target
    if kind == 1:
        letters = [place for place, letter in enumerate(target) if letter.isalpha()]
        hidden = set(chance.sample(letters, len(letters) // 6))
        gaps = "".join("_" if place in hidden else letter for place, letter in enumerate(target))
        return f"Восстанови пропущенные буквы: {gaps}", target
    chance.shuffle(words)
    return f"Расставь слова по порядку: {' '.join(words)}", target


def _random(text: str) -> random.Random:
    """The same numbers for the same text, in every run."""
    return random.Random(text)  # a string seeds by its SHA-512


def instruct(make: Callable[[str, str], Instruction | None]) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A seqio preprocessor from a function of Python: {ru, en} -> {inputs, targets}; pairs with None are left out."""

    def texts(russian: np.ndarray, english: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        made = [make(ru.decode(), en.decode()) for ru, en in zip(russian, english, strict=True)]
        kept = [instruction for instruction in made if instruction is not None]
        return np.array([inputs for inputs, _ in kept], object), np.array([targets for _, targets in kept], object)

    def preprocess(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def batch(pairs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            inputs, targets = tf.numpy_function(texts, [pairs["ru"], pairs["en"]], [tf.string, tf.string])
            return {"inputs": tf.ensure_shape(inputs, [None]), "targets": tf.ensure_shape(targets, [None])}

        return dataset.batch(256).map(batch).unbatch()

    preprocess.__name__ = make.__name__
    return preprocess


@functools.cache
def _pages() -> dict[bytes, bytes]:
    """Paragraph -> the page that it stands on (no paragraph stands on two)."""
    pages = (page["text"] for page in TextSource({"all": PAGES}).examples("all"))
    return {paragraph: page for page in pages for paragraph in page.split(b"\n")}


def pair_belongs(split: str, pair: Example) -> bool:
    """Held out with its page. A pair that the pages lack (1 in 8) goes by its own hash."""
    page = _pages().get(pair["ru"], pair["ru"])
    return (text_hash(page) < HELD_OUT) == (split == "validation")


INSTRUCTIONS = (translate_ru_en, translate_en_ru, complete, restore)

for make in INSTRUCTIONS:
    seqio.TaskRegistry.add(
        f"demo_{make.__name__}",
        source=JsonLinesSource({"train": PAIRS, "validation": PAIRS}, ["ru", "en"], belongs=pair_belongs),
        preprocessors=[
            instruct(make),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos,
        ],
        output_features=settings.output_features(),
        metric_fns=[text_metrics.bleu, text_metrics.chrf, text_metrics.exact_match],
    )

seqio.MixtureRegistry.add("demo_instructions", [f"demo_{make.__name__}" for make in INSTRUCTIONS], default_rate=1.0)
