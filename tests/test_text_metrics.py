"""Metric functions of generated text: beside rouge-score's own tokenizer, and by hand."""

import importlib.util
import inspect

import pytest
from rouge_score.rouge_scorer import RougeScorer

from vikhr_t5 import text_metrics
from vikhr_t5.errors import UserError

ENGLISH = [
    ("The quick brown fox jumps over the lazy dog.", "the quick brown dog jumps on the log"),
    ("It's 5 o'clock, snake_case!", "it s 5 o clock snake case"),
    ("Nothing in common", "something else"),
]


@pytest.mark.parametrize("name", text_metrics.METRICS)
def test_signature_and_ends_of_the_scale(name):
    function = text_metrics.METRICS[name]
    assert list(inspect.signature(function).parameters) == ["targets", "predictions"]  # seqio goes by these names
    texts = ["Вихрь поднял пыль над дорогой у реки", "Кошка спит на тёплой печке весь день"]
    assert list(function(texts, texts).values()) == pytest.approx([100] * (3 if name == "rouge" else 1))
    assert max(function(texts, ["щщщщщ", "zzzzz"]).values()) == 0


def test_rouge_is_rouge_scores_in_english():
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [theirs.score(target, prediction) for target, prediction in ENGLISH]
    ours = text_metrics.rouge(*zip(*ENGLISH, strict=True))
    assert ours == {kind: pytest.approx(100 / 3 * sum(s[kind].fmeasure for s in scores)) for kind in ours}
    assert 0 < ours["rouge2"] < ours["rouge1"] < 100


def test_rouge_reads_russian():
    """4 of 5 words and 4 of 4; pairs: 2 of 4 and 2 of 3; rouge-score's own tokenizer finds nothing."""
    pair = ["Кошка, ёлка и пушистый снег."], ["кошка ёлка пушистый снег"]
    assert text_metrics.rouge(*pair) == pytest.approx({"rouge1": 800 / 9, "rouge2": 400 / 7, "rougeL": 800 / 9})
    assert RougeScorer(["rouge1"]).score(pair[0][0], pair[1][0])["rouge1"].fmeasure == 0


def test_bleu_and_chrf_by_hand():
    # chrF by hand: one character of two is right, and no pair is: n-grams of more than 2 do not count.
    assert text_metrics.chrf(["аб"], ["ав"])["chrf"] == pytest.approx(100 * (0.5 + 0) / 2)
    # BLEU by hand: 4 of 5 words, 3 of 4, 2 of 3, 1 of 2, no brevity penalty.
    found = text_metrics.bleu(["один два три четыре пять"], ["один два три четыре шесть"])["bleu"]
    assert found == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_what_is_the_same_answer():
    targets, predictions = ["Ёлка, дом.", "да"], ["  елка дом", "да"]
    assert text_metrics.exact_match(targets, predictions) == {"exact_match": 100}
    assert text_metrics.sequence_accuracy(targets, predictions) == {"sequence_accuracy": 50}
    assert text_metrics.exact_match(["не да"], ["да"]) == {"exact_match": 0}
    assert text_metrics.exact_match([], []) == {"exact_match": 0}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sacrebleu not installed: pip install 'vikhr-t5\[metrics\]'"):
        text_metrics.chrf(["a"], ["a"])
