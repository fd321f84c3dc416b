"""Metric functions of generated text, for `metric_fns` of a seqio task: (targets, predictions) -> name -> value.

    seqio.TaskRegistry.add("summaries", …, metric_fns=[text_metrics.rouge, text_metrics.chrf])

All values are per cent, 0 to 100. They read texts alone, so training computes them by name, without the task's module,
seqio or TensorFlow (`train/generation.py`); `vikhr-t5 eval`, plain seqio and t5x call them as any other function.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from vikhr_t5.packages import require

Texts = Sequence[str]

_WORD = re.compile(r"[^\W_]+")


def bleu(targets: Texts, predictions: Texts) -> dict[str, float]:
    """BLEU of the corpus by sacreBLEU (Post 2018), its default tokenizer `13a` and smoothing."""
    require("metrics", "sacrebleu")
    import sacrebleu

    return {"bleu": sacrebleu.corpus_bleu(list(predictions), [list(targets)]).score}


def chrf(targets: Texts, predictions: Texts) -> dict[str, float]:
    """chrF2 of the corpus by sacreBLEU (Popović 2015): n-grams of 1 to 6 characters, whatever the language's words."""
    require("metrics", "sacrebleu")
    import sacrebleu

    return {"chrf": sacrebleu.corpus_chrf(list(predictions), [list(targets)]).score}


def rouge(targets: Texts, predictions: Texts) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, -2 and -L by rouge-score (Lin 2004), without stemming.

    Words are letters and digits of any script; rouge-score's own tokenizer knows a-z and 0-9, so that a Russian text is
    empty to it. English has the same values with both.
    """
    require("metrics", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, tokenizer=_Words())
    scores = [scorer.score(*pair) for pair in zip(targets, predictions, strict=True)]
    return {kind: _percent(score[kind].fmeasure for score in scores) for kind in kinds}


def sequence_accuracy(targets: Texts, predictions: Texts) -> dict[str, float]:
    """Predictions that are their target to the letter (t5's metric of this name): labels, answers of one form."""
    same = (target == prediction for target, prediction in zip(targets, predictions, strict=True))
    return {"sequence_accuracy": _percent(map(float, same))}


def exact_match(targets: Texts, predictions: Texts) -> dict[str, float]:
    """Predictions that have their target's words: case, punctuation and spaces do not count, nor е and ё differ.

    SQuAD's exact match (Rajpurkar et al. 2016), without its English articles.
    """
    same = (_words(target) == _words(prediction) for target, prediction in zip(targets, predictions, strict=True))
    return {"exact_match": _percent(map(float, same))}


METRICS: dict[str, Callable[[Texts, Texts], dict[str, float]]] = {
    function.__name__: function for function in (bleu, chrf, rouge, sequence_accuracy, exact_match)
}


class _Words:
    """rouge-score's interface of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower().replace("ё", "е"))


def _percent(values: Iterable[float]) -> float:
    found = list(values)
    return 100 * sum(found) / len(found) if found else 0.0
