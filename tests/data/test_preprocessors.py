"""`Denoise` as a plain seqio preprocessor: the tasks of a token store can be iterated with seqio alone."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from reassemble import reassemble

from vikhr_t5.data.denoisers import Codes, Denoiser, from_json, mixture
from vikhr_t5.data.vocabulary import Vocabulary, train_vocabulary
from vikhr_t5.errors import UserError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

from tasks.preprocessors import Denoise  # noqa: E402

RUSSIAN = Path(__file__).parents[2] / "tasks" / "demo_data" / "ru.txt"
DOCUMENTS = RUSSIAN.read_text(encoding="utf-8").split("\n\n")[:200]
LONG = np.random.default_rng(0).integers(20, 1000, 1_000_000, dtype=np.int32)
Example = dict[str, np.ndarray]
AddTask = Callable[..., str]
LENGTHS = {"inputs": 128, "targets": 96}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return train_vocabulary(DOCUMENTS, tmp_path_factory.mktemp("vocabulary") / "ru.model", 1000, "bpe")


@pytest.fixture
def add_task(vocabulary: Vocabulary) -> Iterator[AddTask]:
    """Registers tasks that denoise DOCUMENTS, or one long document of tokens; they are gone after the test."""
    names: list[str] = []

    def add(denoise: Denoise, extra_ids: int | None = 300, tokens: np.ndarray | None = None) -> str:
        """`extra_ids` None: of bytes, as ByT5."""

        def documents(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
            return tf.data.Dataset.from_tensor_slices({"targets": DOCUMENTS if tokens is None else tokens[None]})

        names.append(f"test_denoise_{len(names)}")
        spm: seqio.Vocabulary = seqio.ByteVocabulary()
        if extra_ids is not None:
            spm = seqio.SentencePieceVocabulary(vocabulary.sentencepiece_model_file, extra_ids=extra_ids)
        seqio.TaskRegistry.add(
            names[-1],
            source=seqio.FunctionDataSource(documents, ["train"]),
            preprocessors=[
                *([seqio.preprocessors.tokenize] if tokens is None else []),
                seqio.CacheDatasetPlaceholder(),
                denoise,
            ],
            output_features={name: seqio.Feature(spm, add_eos=True) for name in ("inputs", "targets")},
        )
        return names[-1]

    yield add
    for name in names:
        seqio.TaskRegistry.remove(name)


def examples(
    name: str, seed: int | None = 1, lengths: dict[str, int] | None = None, **arguments: object
) -> list[Example]:
    task = seqio.get_mixture_or_task(name)
    arguments = {"shuffle": False, "split": "train", **arguments}
    dataset = task.get_dataset(sequence_length=lengths or LENGTHS, seed=seed, **arguments)
    assert {name: spec.dtype for name, spec in dataset.element_spec.items()} == {
        "inputs": tf.int32,
        "targets": tf.int32,
    }
    return list(dataset.as_numpy_iterator())


def text_of(pairs: list[Example], codes: Codes) -> list[int]:
    return [token for pair in pairs for token in reassemble(pair["inputs"], pair["targets"], codes)[0]]


def equal(left: list[Example], right: list[Example]) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(a[side], b[side]) for a, b in zip(left, right, strict=True) for side in LENGTHS
    )


@pytest.mark.parametrize("name", ["span_corruption", "ul2", "ul2r", "fred", "t5gemma2"])
def test_examples_fit_and_hold_the_documents_in_order(add_task: AddTask, vocabulary: Vocabulary, name: str) -> None:
    pairs = examples(add_task(Denoise(name)))
    codes = Codes.of(vocabulary, mixture(name))
    assert all(pair[side].size <= LENGTHS[side] for pair in pairs for side in LENGTHS)
    assert all(max(pair["inputs"].size / 128, pair["targets"].size / 96) > 0.95 for pair in pairs)
    text = [token for document in DOCUMENTS for token in vocabulary.encode(document)]
    found = text_of(pairs, codes)
    assert found == text[: len(found)]
    assert len(text) - len(found) < 4 * sum(LENGTHS.values())  # what fills no window


def test_seeds_and_epochs(add_task: AddTask) -> None:
    name = add_task(Denoise("ul2"))
    first = examples(name)
    assert equal(first, examples(name))
    assert not equal(first, examples(name, seed=2))
    assert not equal(examples(name, seed=None), examples(name, seed=None))
    two = examples(name, num_epochs=2)
    assert equal(first, two[: len(first)])
    inputs = Counter(pair["inputs"].tobytes() for pair in two)
    assert max(inputs.values()) == 1  # the second epoch is corrupted in another way


def test_each_denoiser_has_its_share_of_input_tokens(add_task: AddTask, vocabulary: Vocabulary) -> None:
    denoisers = mixture("fred")
    modes = Codes.of(vocabulary, denoisers).modes
    counts: Counter[int] = Counter()
    for pair in examples(add_task(Denoise("fred"), tokens=LONG)):
        counts[int(pair["inputs"][0])] += pair["inputs"].size
    for denoiser in denoisers:
        assert counts[modes[str(denoiser.mode)]] / counts.total() == pytest.approx(denoiser.weight, rel=0.1)


def test_a_random_split_splits_anywhere(add_task: AddTask) -> None:
    name = add_task(Denoise([Denoiser("S", "prefix", 0.5, random_split=True)]), tokens=LONG)
    pairs = examples(name, lengths={"inputs": 256, "targets": 256})
    rates = np.array([pair["targets"].size / (pair["inputs"].size + pair["targets"].size) for pair in pairs])
    assert np.histogram(rates, bins=4, range=(0, 1))[0] == pytest.approx(np.full(4, rates.size / 4), rel=0.1)


def test_with_a_mixture_and_seqios_own_packing(add_task: AddTask) -> None:
    tasks = [add_task(Denoise("ul2")), add_task(Denoise("span_corruption"))]
    seqio.MixtureRegistry.add("test_denoise_mixture", tasks, default_rate=1.0)
    try:
        dataset = seqio.get_dataset(
            "test_denoise_mixture",
            task_feature_lengths={"inputs": 512, "targets": 512},
            dataset_split="train",
            feature_converter=seqio.EncDecFeatureConverter(pack=True),
            seed=0,
        )
        batch = next(iter(dataset.batch(4).as_numpy_iterator()))
    finally:
        seqio.MixtureRegistry.remove("test_denoise_mixture")
    assert batch["encoder_input_tokens"].shape == batch["decoder_target_tokens"].shape == (4, 512)
    assert np.count_nonzero(batch["encoder_input_tokens"]) > 0.9 * 4 * 512


def test_the_store_learns_the_mixture() -> None:
    mine = [Denoiser("a", "span", 0.2, 4.0, weight=2), Denoiser("b", "prefix", 0.5)]
    assert from_json(Denoise(mine).post_cache_transform()) == mixture(mine)
    assert from_json(Denoise("ul2").post_cache_transform()) == mixture("ul2")


def test_what_cannot_work_is_refused_before_the_first_example(add_task: AddTask) -> None:
    with pytest.raises(UserError, match="unknown denoiser mixture 'ul5'"):
        Denoise("ul5")
    few = add_task(Denoise("ul2"), extra_ids=100)
    with pytest.raises(UserError, match="needs 127 sentinels at inputs 512, targets 512; the vocabulary has 100"):
        examples(few, lengths={"inputs": 512, "targets": 512})
    with pytest.raises(UserError, match="too short for denoiser"):
        examples(few, lengths={"inputs": 4, "targets": 4})
    with pytest.raises(UserError, match="needs sequence_length"):
        seqio.get_mixture_or_task(few).get_dataset(sequence_length=None, split="train", shuffle=False)
    with pytest.raises(UserError, match=r"mode token '<XX>'"):
        examples(add_task(Denoise([Denoiser("x", "prefix", 0.5, mode="<XX>")])))


def test_bytes_are_corrupted_with_the_sentinels_of_byt5(add_task: AddTask) -> None:
    name = add_task(Denoise([Denoiser("byt5", "span", 0.15, 20.0)]), extra_ids=None)
    text = "".join(DOCUMENTS).encode()
    for example in examples(name)[:20]:
        marks = [id for id in example["inputs"].tolist() if id > 247]
        assert marks == [258 - i for i in range(len(marks))] == [id for id in example["targets"].tolist() if id > 247]
        kept = bytes(id - 3 for id in example["inputs"][: example["inputs"].tolist().index(258)])
        assert kept in text
