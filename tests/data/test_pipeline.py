import dataclasses
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from vikhr_t5.data.denoisers import Denoiser
from vikhr_t5.data.pipeline import Dataset, DatasetConfig, open_dataset
from vikhr_t5.data.rows import Batch
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError

S, T, B = 96, 45, 8
RATES = {"text": 3.0, "pairs": 2.0, "fred": 1.0}


@pytest.fixture
def config(write_task: Callable[..., Path], text_task: dict, pairs_task: dict, tmp_path: Path) -> DatasetConfig:
    """A mixture of two denoised tasks and a supervised one."""
    write_task("text", text_task, mixture="ul2")
    write_task("fred", {"targets": text_task["targets"] * 2}, mixture="fred")
    write_task("pairs", pairs_task)
    write_task.mixture("all", RATES)  # type: ignore[attr-defined]
    return DatasetConfig("all", {"inputs": S, "targets": T}, "train", B, seed=1, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def dataset(config: DatasetConfig, small_vocabulary: Vocabulary) -> Dataset:
    return open_dataset(config, small_vocabulary)


def take(dataset: Dataset, *args: int, **kwargs: int) -> list[Batch]:
    with closing(dataset.batches(*args, **kwargs)) as batches:
        return [{feature: np.array(values) for feature, values in batch.items()} for batch in batches]


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for feature in a:
            assert np.array_equal(a[feature], b[feature]), feature


def test_a_batch_is_a_function_of_its_step(
    dataset: Dataset, config: DatasetConfig, small_vocabulary: Vocabulary
) -> None:
    far = 1_000_000  # hundreds of thousands of epochs on, at once
    whole = take(dataset, num_steps=12)
    again = open_dataset(config, small_vocabulary)
    assert_equal(whole[7:], take(again, start_step=7, num_steps=5))
    assert_equal(take(again, far, num_steps=2), take(dataset, far, num_steps=2))
    other = open_dataset(dataclasses.replace(config, seed=2), small_vocabulary)
    assert not np.array_equal(take(other, num_steps=1)[0]["encoder_input_tokens"], whole[0]["encoder_input_tokens"])


def test_hosts_take_their_rows_of_the_same_batches(dataset: Dataset) -> None:
    whole = take(dataset, 5, num_steps=3)
    for count in (2, 4, 8):
        for parts in (np.split(np.arange(B), count), [np.arange(i, B, count) for i in range(count)]):
            for rows in parts:
                part = take(dataset, 5, rows=rows, num_steps=3)
                assert_equal(part, [{f: v[rows] for f, v in batch.items()} for batch in whole])


def test_worker_processes_make_the_same_batches(
    dataset: Dataset, config: DatasetConfig, small_vocabulary: Vocabulary
) -> None:
    with_workers = open_dataset(dataclasses.replace(config, num_workers=2), small_vocabulary)
    assert with_workers.fingerprint == dataset.fingerprint
    half = take(with_workers, 3, rows=range(B // 2, B), num_steps=5)
    assert_equal(half, [{f: v[B // 2 :] for f, v in batch.items()} for batch in take(dataset, 3, num_steps=5)])


def test_rates_and_shares_are_met(dataset: Dataset) -> None:
    """seqio's rates, by examples, and the denoisers' shares, by input tokens."""
    examples: Counter[str] = Counter()
    inputs: Counter[str] = Counter()
    for place in range(16_000):
        task, segments = dataset.segments(place)
        examples[task] += len(segments)
        for segment in segments:
            if segment.denoiser is not None:
                inputs[f"{task}/{segment.denoiser.name}"] += len(segment.inputs)
    for task, rate in RATES.items():
        assert examples[task] / examples.total() == pytest.approx(rate / sum(RATES.values()), rel=0.01)
    for task, shares in (("text", [0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2]), ("fred", [1 / 7] * 7)):
        measured = [inputs[name] for name in dataset.source_names if name.startswith(f"{task}/")]
        assert np.array(measured) / sum(measured) == pytest.approx(shares, rel=0.01)


def test_an_epoch_of_each_task_is_used_up_before_the_next(dataset: Dataset) -> None:
    epochs: dict[int, list[tuple[int, int]]] = {}
    for place in range(24_000):
        task, epoch, row = dataset.order[place]
        epochs.setdefault(task, []).append((epoch, row))
    for task, n in enumerate(dataset.num_rows.values()):
        rows = epochs[task]
        assert len(rows) > 2 * n
        for epoch in (0, 1):
            assert sorted(rows[epoch * n : (epoch + 1) * n]) == [(epoch, row) for row in range(n)]
        assert [row for _, row in rows[:n]] != [row for _, row in rows[n : 2 * n]] != list(range(n))


def test_unshuffled_training_follows_the_store(config: DatasetConfig, small_vocabulary: Vocabulary) -> None:
    text = dataclasses.replace(config, mixture_or_task_name="text", shuffle=False)
    dataset = open_dataset(text, small_vocabulary)
    n = dataset.num_rows["text"]
    assert [dataset.order[place] for place in (0, 1, n - 1, n)] == [(0, 0, 0), (0, 0, 1), (0, 0, n - 1), (0, 1, 0)]


def test_sources_and_fill_are_those_of_the_batches(dataset: Dataset) -> None:
    assert dataset.source_names[:2] == ("text/R-3-15", "text/R-8-15")
    assert {"pairs", "fred/LM"} < set(dataset.source_names)
    batches = take(dataset, num_steps=300)
    inputs = np.mean([batch["encoder_input_tokens"] > 0 for batch in batches])
    targets = np.mean([batch["decoder_target_tokens"] > 0 for batch in batches])
    assert (inputs, targets) == pytest.approx(dataset.fill, rel=0.01)
    ids = set(np.unique([batch["decoder_source_ids"] for batch in batches]).tolist())
    assert ids == {*range(len(dataset.source_names) + 1)} - ({0} if dataset.fill[1] == 1 else set())
    for batch in batches[:20]:
        for tokens, segments in (
            ("encoder_input_tokens", "encoder_segment_ids"),
            ("decoder_target_tokens", "decoder_segment_ids"),
        ):
            assert np.array_equal(batch[tokens] > 0, batch[segments] > 0)


@pytest.mark.parametrize("shard_count", [1, 2])
def test_evaluation_is_one_pass_in_one_order(dataset: Dataset, shard_count: int) -> None:
    def evaluate(num_steps: int | None = None) -> list[Batch]:
        shards = []
        for rows in np.split(np.arange(B), shard_count):
            with closing(dataset.eval_batches(num_steps, rows)) as batches:
                shards.append(list(batches))
        return [{f: np.concatenate([b[f] for b in parts]) for f in parts[0]} for parts in zip(*shards, strict=True)]

    batches = evaluate()
    total = sum(dataset.num_rows.values())
    assert len(batches) == -(-total // B)
    rows = np.concatenate([batch["decoder_target_tokens"] for batch in batches])
    assert rows.shape == (len(batches) * B, T)
    assert rows[:total].any(axis=1).all()
    assert not rows[total:].any()
    assert len(np.unique(rows[:total], axis=0)) == total
    assert_equal(evaluate(3), batches[:3])
    # Already a part of the pass holds all tasks.
    few = {dataset.source_names[i - 1].split("/")[0] for i in np.unique(batches[0]["decoder_source_ids"]) if i}
    assert few == {"text", "pairs", "fred"}


def test_unpacked_rows_hold_one_segment(config: DatasetConfig, small_vocabulary: Vocabulary) -> None:
    dataset = open_dataset(dataclasses.replace(config, pack=False), small_vocabulary)
    for batch in take(dataset, num_steps=4):
        assert batch["decoder_segment_ids"].max() == batch["encoder_segment_ids"].max() == 1
    assert dataset.row_rates == pytest.approx(dataset.example_rates)


def test_the_natural_targets_length_fills_both_sides(config: DatasetConfig, small_vocabulary: Vocabulary) -> None:
    wide = dataclasses.replace(
        config, mixture_or_task_name="text", task_feature_lengths={"inputs": 128, "targets": 128}
    )
    natural = open_dataset(wide, small_vocabulary).natural_targets_length
    fitted = dataclasses.replace(wide, task_feature_lengths={"inputs": 128, "targets": natural})
    assert min(open_dataset(wide, small_vocabulary).fill) < 0.5
    assert min(open_dataset(fitted, small_vocabulary).fill) > 0.97


def test_denoisers_can_be_replaced(config: DatasetConfig, small_vocabulary: Vocabulary) -> None:
    one = [Denoiser("mine", "span", 0.3, 4.0)]
    dataset = open_dataset(dataclasses.replace(config, denoisers=one), small_vocabulary)
    assert dataset.source_names == ("text/mine", "pairs", "fred/mine")
    named = open_dataset(dataclasses.replace(config, denoisers="span_corruption"), small_vocabulary)
    assert named.source_names == ("text/span-3-15", "pairs", "fred/span-3-15")
    assert len({dataset.fingerprint, named.fingerprint, open_dataset(config, small_vocabulary).fingerprint}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 9},
        {"batch_size": 16},
        {"shuffle": False},
        {"pack": False},
        {"task_feature_lengths": {"inputs": 96, "targets": 48}},
    ],
)
def test_the_fingerprint_changes_with_what_decides_the_batches(
    dataset: Dataset, config: DatasetConfig, small_vocabulary: Vocabulary, change: dict
) -> None:
    assert open_dataset(dataclasses.replace(config, **change), small_vocabulary).fingerprint != dataset.fingerprint
    same = dataclasses.replace(config, num_workers=1)
    assert open_dataset(same, small_vocabulary).fingerprint == dataset.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture_or_task_name": "txet"}, "txet is not cached.*nearest: text"),
        ({"split": "validation"}, "no split 'validation'; it has: train"),
        ({"task_feature_lengths": {"inputs": 4, "targets": 4}}, "lengths too short for denoiser"),
        ({"task_feature_lengths": {"inputs": 96}}, "TASK_FEATURE_LENGTHS is .*must be like"),
        ({"task_feature_lengths": {"inputs": 96, "targets": 0}}, "TASK_FEATURE_LENGTHS is .*must be like"),
        ({"task_feature_lengths": {"inputs": 2048, "targets": 2048}}, "X-3-50.* needs 511 sentinels.* has 300"),
        ({"task_feature_lengths": {"inputs": 900_000, "targets": 90_000}, "denoisers": [Denoiser("S", "prefix", 0.1)]},
         "holds [0-9]+ tokens; its first row of 900000/90000 takes [0-9]+"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"denoisers": "ulwto"}, "unknown denoiser mixture 'ulwto'.*nearest"),
        ({"denoisers": "ul2", "mixture_or_task_name": "pairs"}, "pairs has no task of text to denoise"),
        ({"denoisers": [Denoiser("R", "span", 0.15, 3.0, mode="[NLX]")]}, r"\[NLX\]"),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_one_line(
    config: DatasetConfig, small_vocabulary: Vocabulary, change: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_dataset(dataclasses.replace(config, **change), small_vocabulary)
    assert "\n" not in str(error.value)
