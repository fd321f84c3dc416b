"""Packed rows: documents do not see each other, no token is wasted, shares and order follow from the seed."""

import itertools
import pickle

import numpy as np
import pytest
import tiny_mistral
import torch
from transformers import DataCollatorWithFlattening

from vikhr_mistral.packing import CYCLE, IGNORED, Collator, DocumentRows, ExampleRows, MixedRows
from vikhr_t5.errors import UserError


class Documents:
    """A TokenizedCorpus in memory."""

    def __init__(self, documents, alike=None):
        self.tokens = np.concatenate([np.array(document) for document in documents]).astype(np.uint16)
        self.ends = np.cumsum([len(document) for document in documents])
        self.alike = None if alike is None else np.array(alike)


def random_documents(count, seed=0, size=60, longest=30):
    """Documents in which the first token is 1, the last 2, and no other token is either."""
    random = np.random.default_rng(seed)
    return [[1, *random.integers(3, size, random.integers(0, longest)), 2] for _ in range(count)]


def test_the_rows_of_the_docstring():
    """Two documents, of 4 and 5 tokens, in rows of 6 (an order is drawn until the first stands first)."""
    corpus = Documents([[1, 11, 12, 2], [1, 21, 22, 23, 2]], alike=[False, True])
    rows = next(r for seed in range(99) if (r := DocumentRows(corpus, 6, seed))[0]["input_ids"][1] == 11)
    assert {name: value.tolist() for name, value in rows[0].items()} == {
        "input_ids": [1, 11, 12, 2, 1, 21],
        "position_ids": [0, 1, 2, 3, 0, 1],
        "targets": [11, 12, 2, IGNORED, 21, 22],
        "source_ids": [0] * 6,
        "anchored": [0, 0, 0, 0, 1, 1],
    }
    assert rows[1]["input_ids"][:3].tolist() == [22, 23, 2]
    assert rows[1]["position_ids"][:3].tolist() == [0, 1, 2]
    assert rows[1]["targets"][:3].tolist() == [23, 2, IGNORED]


def test_no_token_is_wasted():
    """Each epoch's rows hold each document's tokens once, without padding; and each but the first is a target once."""
    documents = random_documents(40)
    corpus = Documents(documents)
    length = len(corpus.tokens) // 8  # epochs begin inside rows
    rows, epochs = DocumentRows(corpus, length, seed=3), 5
    count = epochs * len(corpus.tokens) // length
    stream = np.concatenate([rows[i]["input_ids"] for i in range(count)])
    targets = np.concatenate([rows[i]["targets"] for i in range(count)])
    seen = []
    for epoch in range(epochs - 1):
        part = slice(epoch * len(corpus.tokens), (epoch + 1) * len(corpus.tokens))
        ends = np.flatnonzero(stream[part] == 2) + 1
        found = [piece.tolist() for piece in np.split(stream[part], ends)[:-1]]
        assert sorted(found) == sorted(documents)
        seen.append(found)
        expected = np.append(stream[part][1:], 0)
        expected[stream[part] == 2] = IGNORED
        np.testing.assert_array_equal(targets[part], expected)
    assert seen[0] != seen[1]  # another order


def test_rows_follow_from_the_seed_alone():
    corpus = Documents(random_documents(30))
    first, second = DocumentRows(corpus, 32, seed=1), DocumentRows(corpus, 32, seed=1)
    later = second[9]  # without those before it
    for name, value in first[9].items():
        np.testing.assert_array_equal(value, later[name])
        np.testing.assert_array_equal(value, pickle.loads(pickle.dumps(first))[9][name])  # in a data worker
    assert (DocumentRows(corpus, 32, seed=2)[0]["input_ids"] != first[0]["input_ids"]).any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_a_document_are_the_same_alone_and_packed(attention):
    """Also for documents of one and two tokens, and under a sliding window."""
    documents = [*random_documents(12, longest=20), [5], [6], [1, 2]]
    model = tiny_mistral.model(64, attn_implementation=attention, sliding_window=8)
    row = DocumentRows(Documents(documents), sum(map(len, documents)), seed=0)[0]
    batch = Collator(attention)([row, row])
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        starts = [*np.flatnonzero(row["position_ids"] == 0), len(row["input_ids"])]
        assert len(starts) == len(documents) + 1
        for start, stop in itertools.pairwise(starts):
            alone = model(input_ids=batch["input_ids"][:1, start:stop], use_cache=False).logits
            torch.testing.assert_close(packed[1:, start:stop], alone, atol=2e-6, rtol=1e-5)


def test_a_mask_or_a_cache_would_let_documents_see_each_other():
    """Why the collator gives no attention_mask and the loss asks for no cache."""
    model = tiny_mistral.model(64)
    ids, positions = torch.tensor([[1, 5, 6, 1, 7, 8]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    alone = model(input_ids=ids[:, 3:]).logits
    for leak in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(ids)}):
        assert (model(input_ids=ids, position_ids=positions, **leak).logits[:, 3:] - alone).abs().max() > 1e-3
    ours = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(ours[:, 3:], alone, atol=2e-6, rtol=1e-5)


def test_flash_attention_gets_one_long_row_as_transformers_makes_it():
    rows = DocumentRows(Documents(random_documents(20)), 16, seed=0)
    batch = Collator("flash_attention_2")([rows[0], rows[1]])
    starts = np.flatnonzero(batch["position_ids"][0].numpy() == 0)
    pieces = np.split(batch["input_ids"][0].numpy(), starts[1:])
    theirs = DataCollatorWithFlattening()([{"input_ids": piece.tolist()} for piece in pieces])
    assert batch["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert batch["position_ids"].tolist() == theirs["position_ids"].tolist()


def test_shares_are_exact_and_spread():
    corpora = [Documents(random_documents(30, seed)) for seed in range(2)]
    sources = [DocumentRows(corpus, 16, 0, i) for i, corpus in enumerate(corpora)]
    mixed = MixedRows(sources, [0.9, 0.1], 3 * CYCLE)
    ids = np.array([mixed[i]["source_ids"][0] for i in range(2000)])
    assert (ids[:1000] == 1).sum() == (ids[1000:] == 1).sum() == 100
    assert {(ids[start : start + 20] == 1).sum() for start in range(0, 2000, 20)} == {2}
    english = [mixed[i]["input_ids"] for i in range(60) if ids[i] == 1]
    np.testing.assert_array_equal(
        np.stack(english), np.stack([sources[1][k]["input_ids"] for k in range(len(english))])
    )
    with pytest.raises(UserError, match="above 0"):
        MixedRows(sources, [1.0, 0.0], 10)
    with pytest.raises(UserError, match="below 1 in"):
        MixedRows(sources, [1.0, 1e-5], 10)


def test_examples_stay_whole():
    examples = [
        {"input_ids": [1, *range(10, 10 + n), 2], "labels": [IGNORED, IGNORED, *range(11, 10 + n), 2]}
        for n in (3, 5, 7, 4, 9, 2)
    ]
    rows = ExampleRows(examples, length=14, seed=0, pad_id=0, num_rows=12)
    found = []
    for i in range(rows.rows_per_epoch):
        row = rows[i]
        assert {len(value) for value in row.values()} == {14}
        ids, targets = row["input_ids"], row["targets"]
        for start, stop in zip(np.flatnonzero(ids == 1), np.flatnonzero(ids == 2) + 1, strict=True):
            found.append(ids[start:stop].tolist())
            assert row["position_ids"][start:stop].tolist() == list(range(stop - start))
            labels = next(e["labels"] for e in examples if e["input_ids"] == found[-1])
            assert targets[start:stop].tolist() == [*labels[1:], IGNORED]
        assert (targets[ids == 0] == IGNORED).all()
    assert sorted(found) == sorted(example["input_ids"] for example in examples)
    assert len({tuple(rows[i]["input_ids"]) for i in range(12)}) > rows.rows_per_epoch  # the second epoch is another
    with pytest.raises(UserError, match="example 4 has 11 tokens, and a row 10"):
        ExampleRows(examples, length=10, seed=0)
