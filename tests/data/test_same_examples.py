"""One task through plain seqio and through the token store: the same examples, and the same corruption of a seed."""

import importlib
import json
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import seqio

from vikhr_t5.data import denoisers, sources
from vikhr_t5.data.cache import cache
from vikhr_t5.data.denoisers import Codes
from vikhr_t5.data.mixing import digest
from vikhr_t5.data.rows import ExampleRows, WindowRows
from vikhr_t5.data.store import TokenStore, task_directory
from vikhr_t5.data.vocabulary import Vocabulary

TASKS = """
import functools, seqio
from seqio.preprocessors import append_eos, append_eos_after_trim, rekey, tokenize
from tasks import cleaning, corpora, flan, saiga, settings
from tasks.preprocessors import Denoise
from vikhr_t5.data.sources import JsonLinesSource, TextSource
corpora.add_corpus(
    "same_text", TextSource({"train": "pages.txt"}),
    steps=(cleaning.nfc, cleaning.squeeze, functools.partial(cleaning.length_within, min_chars=100)),
)
flan.add_task("same_flan", "me/flan", ("inputs", "target"))
saiga.add_task("same_saiga", "me/saiga")
for eos in (append_eos, append_eos_after_trim):
    seqio.TaskRegistry.add(
        f"same_{eos.__name__}",
        source=JsonLinesSource({"train": "me/flan/a.jsonl"}, ["inputs", "target"]),
        preprocessors=[
            functools.partial(rekey, key_map={"inputs": "inputs", "targets": "target"}),
            tokenize, seqio.CacheDatasetPlaceholder(), eos,
        ],
        output_features=settings.output_features(),
    )
"""
TEXT = "same_text"
SUPERVISED = ("same_flan", "same_saiga", "same_append_eos", "same_append_eos_after_trim")
LENGTHS = {"inputs": 40, "targets": 24}
SEED = 3


@pytest.fixture(scope="module")
def stores(
    documents: list[str], small_vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, TokenStore]]:
    """All tasks, cached in several shards."""
    folder = tmp_path_factory.mktemp("same")
    chats = [
        {"messages": [{"role": "user", "content": text[:90]}, {"role": "bot", "content": text[90:200]}] * 2}
        for text in documents
        if len(text) > 250
    ]
    pairs = [{"inputs": f"Продолжи: {text[:150]}", "target": text[150:350]} for text in documents]
    for name, rows in (("flan", [*pairs, {"inputs": " ", "target": "x"}]), ("saiga", chats)):
        (folder / "me" / name).mkdir(parents=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "me" / name / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "pages.txt").write_text("\n\n".join(["Коротко.", *documents]), encoding="utf-8")
    (folder / "same_tasks.py").write_text(TASKS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        patch.setattr(sources, "PIECE_BYTES", 130_000)
        patch.setenv("VIKHR_T5_DATA_DIR", str(folder))
        patch.setenv("VIKHR_T5_VOCABULARY", small_vocabulary.sentencepiece_model_file)
        patch.setenv("VIKHR_T5_EXTRA_IDS", str(small_vocabulary.extra_ids))
        importlib.invalidate_caches()
        for task in (TEXT, *SUPERVISED):
            cache(task, "same_tasks", "cache", splits=["train"], num_workers=1)
        found = {task: TokenStore(task_directory(folder / "cache", task, "train")) for task in (TEXT, *SUPERVISED)}
        assert all(len(store.manifest.shards) > 1 for store in found.values())
        yield found


def by_shard(task: str, store: TokenStore, lengths: dict[str, int] | None) -> Iterator[dict[str, np.ndarray]]:
    """Plain seqio's examples, its shards one after another, as a store has them."""
    number = len(store.manifest.shards)
    for index in range(number):
        dataset = seqio.get_mixture_or_task(task).get_dataset(
            lengths, "train", shuffle=False, shard_info=seqio.ShardInfo(index, number), num_epochs=1
        )
        yield from dataset.as_numpy_iterator()


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for side in ("inputs", "targets"):
        np.testing.assert_array_equal(found[side], expected[side])


@pytest.mark.parametrize("task", SUPERVISED)
def test_examples_of_a_supervised_task(stores: dict[str, TokenStore], task: str) -> None:
    """Whole, as the store has them."""
    store = stores[task]
    expected = list(by_shard(task, store, None))
    assert len(store) == len(expected) > 200
    for index, example in enumerate(expected):
        same(store.example(index), example)


@pytest.mark.parametrize("task", SUPERVISED)
def test_examples_trimmed_to_the_lengths(stores: dict[str, TokenStore], task: str) -> None:
    """As training reads them: of an example that is too long, `append_eos_after_trim` keeps EOS, `append_eos` not."""
    store = stores[task]
    rows = ExampleRows(store, (LENGTHS["inputs"], LENGTHS["targets"]), SEED, 1, pack=False)
    found = {int(rows.plan.order[row]): rows.segments(0, row)[0] for row in range(rows.num_rows)}
    ends = set()
    for index, example in enumerate(by_shard(task, store, LENGTHS)):
        same(found[index]._asdict(), example)
        if len(store.example(index)["targets"]) > LENGTHS["targets"]:
            ends.add(int(example["targets"][-1]) == 1)
    assert ends == {task != "same_append_eos"}  # some were too long


def test_documents_of_a_denoised_task(stores: dict[str, TokenStore]) -> None:
    """Cleaned, left out and tokenized alike, before any denoising."""
    store, task = stores[TEXT], seqio.TaskRegistry.get(TEXT)
    number = len(store.manifest.shards)
    expected = [
        example["targets"]
        for index in range(number)
        for example in task.preprocess_precache(
            task.source.get_dataset("train", shuffle=False, shard_info=seqio.ShardInfo(index, number))
        ).as_numpy_iterator()
    ]
    assert len(store) == len(expected) > 200
    for index, tokens in enumerate(expected):
        np.testing.assert_array_equal(store.example(index)["targets"], tokens)
    assert store.manifest.dropped["length_within"] >= 1


def codes(vocabulary: Vocabulary) -> Codes:
    return Codes.of(vocabulary, denoisers.mixture("ul2"))


def test_windows_that_seqio_denoises_made_again_from_the_store(
    stores: dict[str, TokenStore], small_vocabulary: Vocabulary
) -> None:
    """seqio's window n of a seed is `denoisers.corrupt` of the store's next tokens, with Philox of (the seed, n).

    seqio reads the pieces of the source in order, the store has them shard by shard; both have the same documents.
    """
    store, task, lengths = stores[TEXT], seqio.TaskRegistry.get(TEXT), {"inputs": 256, "targets": 120}
    numbers = len(store.manifest.shards)
    assert numbers == len(task.source.list_shards("train"))  # a shard for each piece, so the orders are one
    windows = list(task.get_dataset(lengths, "train", shuffle=False, seed=SEED, num_epochs=1).as_numpy_iterator())
    assert len(windows) > 50
    with seqio.utils.map_seed_manager(SEED + 42 * task._cache_step_idx):  # so many are kept for what stands before
        take = seqio.map_over_dataset(lambda _, seed: seed, num_seeds=1)
        seed = next(take(seqio.utils.tf.data.Dataset.from_tensors(0)).as_numpy_iterator())
    philox_key, mixture, start = np.array(seed).view(np.uint64), denoisers.mixture("ul2"), 0
    sizes = np.array([denoisers.longest_window(denoiser, *lengths.values()).inputs for denoiser in mixture])
    shares = np.cumsum([denoiser.weight for denoiser in mixture] / sizes)
    for number, window in enumerate(windows):
        rng = np.random.Generator(np.random.Philox(key=philox_key, counter=[0, 0, number, 0]))
        denoiser = mixture[int(np.searchsorted(shares, rng.uniform(0, shares[-1]), side="right"))]
        rng.uniform()  # where a random split would be; ul2 has none
        counts = denoisers.longest_window(denoiser, *lengths.values())
        text = store.tokens("targets", start, start + counts.raw)
        inputs, targets = denoisers.corrupt(text, denoiser, counts, rng, codes(small_vocabulary))
        same({"inputs": inputs, "targets": targets}, window)
        start += counts.raw
    again = list(task.get_dataset(lengths, "train", shuffle=False, seed=SEED, num_epochs=1).as_numpy_iterator())
    other = list(task.get_dataset(lengths, "train", shuffle=False, seed=SEED + 1, num_epochs=1).as_numpy_iterator())
    for one, two in zip(windows, again, strict=True):
        same(one, two)
    assert any(one["inputs"].tolist() != two["inputs"].tolist() for one, two in zip(windows, other, strict=False))


def test_windows_that_training_denoises_made_again_from_the_store(
    stores: dict[str, TokenStore], small_vocabulary: Vocabulary
) -> None:
    """Row r of epoch e and a seed: the same function on the store's tokens, with Philox of (seed and task, r, e)."""
    store, vocabulary = stores[TEXT], small_vocabulary
    mixture = denoisers.from_json(store.manifest.transform or {})
    rows = WindowRows(store, mixture, codes(vocabulary), (256, 120), SEED, 1)
    philox_key = np.frombuffer(digest(SEED, TEXT)[:16], np.uint64)
    start = 0
    for row in range(min(rows.num_rows, 60)):
        rng = np.random.Generator(np.random.Philox(key=philox_key, counter=[0, 0, row, 0]))
        for segment in rows.segments(0, row):
            assert segment.text is not None
            assert segment.denoiser is not None
            np.testing.assert_array_equal(segment.text, store.tokens("targets", start, start + len(segment.text)))
            start += len(segment.text)
            noise = len(segment.targets) - 1 - int((segment.targets >= vocabulary.last_sentinel).sum())
            counts = denoisers.window(segment.denoiser, len(segment.text), noise)
            inputs, targets = denoisers.corrupt(segment.text, segment.denoiser, counts, rng, codes(vocabulary))
            same(segment._asdict(), {"inputs": inputs, "targets": targets})
