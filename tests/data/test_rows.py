from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vikhr_t5.data.denoisers import Codes, mixture
from vikhr_t5.data.packing import ExamplePlan
from vikhr_t5.data.rows import DECODER_FEATURES, ENCODER_FEATURES, ExampleRows, Layout, Segment, WindowRows, empty_batch
from vikhr_t5.data.store import TokenStore
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError

S, T = 96, 45


def example(inputs: list[int], targets: list[int]) -> Segment:
    return Segment(None, None, np.array(inputs), np.array(targets), source=1)


def test_the_worked_example_of_the_batch_contract() -> None:
    batch = empty_batch(2, 8, 7)
    segments = [example([11, 12, 99, 1], [99, 13, 1]), example([21, 99, 1], [99, 22, 1])]
    Layout([(4, 3), (3, 3)], [3, 5], 8, 7).write(batch, 1, segments)
    expected = {
        "encoder_input_tokens": [11, 12, 99, 1, 21, 99, 1, 0],
        "encoder_segment_ids": [1, 1, 1, 1, 2, 2, 2, 0],
        "encoder_positions": [0, 1, 2, 3, 0, 1, 2, 0],
        "decoder_target_tokens": [99, 13, 1, 99, 22, 1, 0],
        "decoder_input_tokens": [0, 99, 13, 0, 99, 22, 0],
        "decoder_loss_weights": [1, 1, 1, 1, 1, 1, 0],
        "decoder_segment_ids": [1, 1, 1, 2, 2, 2, 0],
        "decoder_positions": [0, 1, 2, 0, 1, 2, 0],
        "decoder_source_ids": [3, 3, 3, 5, 5, 5, 0],
    }
    assert {feature: values[1].tolist() for feature, values in batch.items()} == expected
    assert all(values.dtype == np.int32 and not values[0].any() for values in batch.values())


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=5))
def test_any_lengths_lie_side_by_side(lengths: list[tuple[int, int]]) -> None:
    batch = empty_batch(1, 30, 30)
    segments = [
        example([10 * n + i for i in range(a)], [10 * n + i + 5 for i in range(b)])
        for n, (a, b) in enumerate(lengths, 1)
    ]
    Layout(lengths, [1] * len(lengths), 30, 30).write(batch, 0, segments)
    row = {feature: values[0] for feature, values in batch.items()}
    for n, segment in enumerate(segments, 1):
        inside = row["decoder_segment_ids"] == n
        assert row["encoder_input_tokens"][row["encoder_segment_ids"] == n].tolist() == segment.inputs.tolist()
        assert row["decoder_target_tokens"][inside].tolist() == segment.targets.tolist()
        assert row["decoder_input_tokens"][inside].tolist() == [0, *segment.targets[:-1]][: len(segment.targets)]
        assert row["decoder_positions"][inside].tolist() == list(range(len(segment.targets)))
    assert row["decoder_loss_weights"].sum() == sum(targets for _, targets in lengths)


# ---- denoised tasks --------------------------------------------------------------------------------------------------


@pytest.fixture
def window_rows(write_task: Callable[..., Path], text_task: dict, small_vocabulary: Vocabulary) -> WindowRows:
    ul2 = mixture("ul2")
    store = TokenStore(write_task("text", text_task, mixture="ul2"))
    return WindowRows(store, ul2, Codes.of(small_vocabulary, ul2), (S, T), seed=3, first_source=4)


def restored(inputs: np.ndarray, targets: np.ndarray, vocabulary: Vocabulary) -> list[int]:
    """The text of a window, put together again from what the model sees."""
    sentinels = range(vocabulary.size - vocabulary.extra_ids, vocabulary.size)
    modes = {vocabulary.mode_id(token) for token in vocabulary.mode_tokens}
    assert inputs[-1] == targets[-1] == vocabulary.eos_id
    kept, asked = [t for t in inputs[:-1].tolist() if t not in modes], targets[:-1].tolist()
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    for token in asked:
        if token in sentinels:
            span = spans.setdefault(token, [])
        else:
            span.append(token)
    if not spans:
        return kept + asked
    return [token for t in kept for token in (spans.pop(t) if t in sentinels else [t])]


def read_rows(rows: WindowRows, epoch: int) -> Iterator[dict[str, np.ndarray]]:
    for row in range(rows.num_rows):
        batch = empty_batch(1, S, T)
        rows.write(batch, 0, epoch, row)
        yield {feature: values[0] for feature, values in batch.items()}


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_holds_every_token_of_the_text_once(
    window_rows: WindowRows, small_vocabulary: Vocabulary, epoch: int
) -> None:
    text: list[int] = []
    for row in read_rows(window_rows, epoch):
        for segment in range(1, row["encoder_segment_ids"].max() + 1):
            inputs = row["encoder_input_tokens"][row["encoder_segment_ids"] == segment]
            targets = row["decoder_target_tokens"][row["decoder_segment_ids"] == segment]
            text += restored(inputs, targets, small_vocabulary)
    whole = window_rows.store.tokens("targets", 0, window_rows.num_tokens).tolist()
    # Less than a row is left over, and the rows go once around the ring of the text, from some place on.
    assert 0 <= len(whole) - len(text) < max(template.raw for template in window_rows.plan.templates)
    starts = [i for i in range(len(whole)) if whole[i : i + 40] == text[:40]]
    assert any((whole[start:] + whole[:start])[: len(text)] == text for start in starts)
    assert (starts == [0]) == (epoch == 0)


def test_rows_are_full_and_name_their_denoisers(window_rows: WindowRows) -> None:
    rows = list(read_rows(window_rows, 0))
    useful = [np.mean([row[f"{side}_tokens"] > 0 for row in rows]) for side in ("encoder_input", "decoder_target")]
    assert useful == pytest.approx(window_rows.fill, abs=0.005)
    inputs_of: dict[int, int] = {}
    for row in rows:
        assert np.array_equal(row["decoder_source_ids"] > 0, row["decoder_target_tokens"] > 0)
        for segment in range(1, row["encoder_segment_ids"].max() + 1):
            (source,) = set(row["decoder_source_ids"][row["decoder_segment_ids"] == segment].tolist())
            inputs_of[source] = inputs_of.get(source, 0) + int(np.sum(row["encoder_segment_ids"] == segment))
    assert sorted(inputs_of) == list(range(4, 11))
    shares = [inputs_of[source] / sum(inputs_of.values()) for source in sorted(inputs_of)]
    assert shares == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2], rel=0.05)  # a few hundred rows
    assert window_rows.sources[0] == "text/R-3-15"


def test_a_row_depends_on_seed_epoch_and_number_alone(window_rows: WindowRows, small_vocabulary: Vocabulary) -> None:
    def tokens(rows: WindowRows, epoch: int, row: int) -> list[int]:
        return np.concatenate([segment.inputs for segment in rows.segments(epoch, row)]).tolist()

    ul2 = mixture("ul2")
    codes = Codes.of(small_vocabulary, ul2)
    again = WindowRows(window_rows.store, ul2, codes, (S, T), seed=3, first_source=1)
    other = WindowRows(window_rows.store, ul2, codes, (S, T), seed=4, first_source=1)
    assert tokens(window_rows, 2, 7) == tokens(again, 2, 7) != tokens(other, 2, 7)
    assert tokens(window_rows, 2, 7) != tokens(window_rows, 3, 7)


def test_shuffling_is_a_permutation_that_keeps_templates_in_place(window_rows: WindowRows) -> None:
    places = range(window_rows.num_rows)
    orders = [[window_rows.shuffled(epoch, place) for place in places] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(places)
    assert orders[0] != orders[1] != list(places)
    locate = window_rows.plan.locate
    assert [locate(row)[0] for row in orders[0]] == [locate(place)[0] for place in places]


def test_a_text_shorter_than_a_row_is_refused(
    write_task: Callable[..., Path], text_task: dict, small_vocabulary: Vocabulary
) -> None:
    ul2 = mixture("ul2")
    store = TokenStore(write_task("short", {"targets": [text_task["targets"][0][:50]]}, mixture="ul2"))
    with pytest.raises(UserError, match=r"short, split 'train', holds 50 tokens; its first row of 512/240 takes \d+"):
        WindowRows(store, ul2, Codes.of(small_vocabulary, ul2), (512, 240), seed=0, first_source=1)


# ---- supervised tasks ------------------------------------------------------------------------------------------------


def test_examples_are_packed_as_seqio_packs_them(write_task: Callable[..., Path], pairs_task: dict) -> None:
    seqio = pytest.importorskip("seqio")
    tf = pytest.importorskip("tensorflow")
    rows = ExampleRows(TokenStore(write_task("pairs", pairs_task)), (S, T), seed=0, first_source=2)
    converter = seqio.EncDecFeatureConverter(pack=True)
    for row in (0, rows.num_rows // 2):
        examples = [rows.store.example(i) for i in rows.plan.examples(row)]
        signature = {feature: tf.TensorSpec([None], tf.int32) for feature in ("inputs", "targets")}
        dataset = tf.data.Dataset.from_generator(lambda e=examples: iter(e), output_signature=signature)
        lengths = {"inputs": S, "targets": T}
        dataset = seqio.utils.trim_dataset(dataset, lengths, lengths)
        (theirs,) = converter(dataset, lengths).as_numpy_iterator()
        ours = empty_batch(1, S, T)
        rows.write(ours, 0, 0, row)
        assert set(ours) == {*ENCODER_FEATURES, *DECODER_FEATURES} == {*theirs, "decoder_source_ids"}
        for feature, values in theirs.items():
            assert np.array_equal(ours[feature][0], values), feature
        assert set(ours["decoder_source_ids"][0].tolist()) <= {0, 2}


def test_every_example_once_in_an_epoch(write_task: Callable[..., Path], pairs_task: dict) -> None:
    rows = ExampleRows(TokenStore(write_task("pairs", pairs_task)), (S, T), seed=0, first_source=1)
    order = [rows.shuffled(1, place) for place in range(rows.num_rows)]
    found = sorted(tuple(segment.targets) for row in order for segment in rows.segments(1, row))
    assert found == sorted(tuple(targets[:T]) for targets in pairs_task["targets"])
    assert rows.examples_per_row == pytest.approx(len(found) / rows.num_rows)
    useful = sum(min(len(targets), T) for targets in pairs_task["targets"]) / (rows.num_rows * T)
    assert rows.fill[1] == pytest.approx(useful)
    assert max(rows.fill) > 0.9


def test_a_plan_is_kept_beside_the_store(
    write_task: Callable[..., Path], pairs_task: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task("pairs", pairs_task)
    first = ExampleRows(TokenStore(folder), (S, T), seed=0, first_source=1).plan

    def never(*_: object, **__: object) -> ExamplePlan:
        raise AssertionError("planned again")

    with monkeypatch.context() as patch:
        patch.setattr("vikhr_t5.data.rows.plan_examples", never)
        ExampleRows(TokenStore(folder), (S, T), seed=1, first_source=1)  # of another order; made when it is asked for
        again = ExampleRows(TokenStore(folder), (S, T), seed=0, first_source=1).plan
    assert np.array_equal(first.order, again.order)
    assert np.array_equal(first.bounds, again.bounds)
    (file,) = folder.glob("rows-*.npy")
    file.write_bytes(file.read_bytes()[:100])  # cut short: it is made again
    assert np.array_equal(ExampleRows(TokenStore(folder), (S, T), seed=0, first_source=1).plan.order, first.order)


def test_a_task_without_inputs_or_examples_is_refused(write_task: Callable[..., Path], text_task: dict) -> None:
    with pytest.raises(UserError, match="task text has no feature 'inputs'"):
        ExampleRows(TokenStore(write_task("text", text_task)), (S, T), seed=0, first_source=1)
    with pytest.raises(UserError, match="task none, split 'train', has no examples"):
        ExampleRows(TokenStore(write_task("none", {"inputs": [], "targets": []})), (S, T), seed=0, first_source=1)
