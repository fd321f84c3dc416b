"""Greedy, beam and sampled generation against transformers, in float32.

By default on random weights with sharp attention, a few rows; slow: on models that have learned to fill blanks, and 200
real texts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from random_params import enlarged_params
from trained_models import V10, V11, cloze, real_texts, save_hf, train, vocabulary
from transformers import T5ForConditionalGeneration
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from conversion.stored import MemoryModel
from vikhr_t5 import api
from vikhr_t5.api import Decoding
from vikhr_t5.data.byte_vocabulary import ByteVocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model.sampling import Sampling, choose, truncate

LENGTH = 24
EOS = 1
# At a tie rounding decides: two answers whose scores are as close as this are equally good. Scores are sums over up to
# LENGTH tokens of float32 log-probabilities, of which either side has its own rounding.
TIE = 2e-5


CONFIGS = {
    "tied": dataclasses.replace(V10, emb_dim=32, mlp_dim=64, num_encoder_layers=1, num_decoder_layers=2),
    "untied": dataclasses.replace(V11, emb_dim=32, mlp_dim=64, num_encoder_layers=2, num_decoder_layers=1),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(ours, transformers') of the same random weights, for rows of ids."""
    words = ByteVocabulary(20)
    config = dataclasses.replace(CONFIGS[request.param], vocab_size=words.padded_size)
    params = enlarged_params(config, 3)
    if config.logits_via_embedding:
        params["token_embedder"]["embedding"] *= 0.2  # else each token's likeliest successor is itself
        params["token_embedder"]["embedding"][EOS] *= 3  # so that answers end
        params["decoder"]["decoder_norm"]["scale"] *= 10
    else:
        params["decoder"]["logits_dense"]["kernel"][:, EOS] *= 3
    folder = save_hf(MemoryModel(params, config, words), tmp_path_factory.mktemp("hf") / "model")
    return api.load(folder, batch_size=8), T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def random_rows(count):
    """Inputs of lengths that share one shape here, so that little is compiled."""
    rng = np.random.default_rng(0)
    return [[*rng.integers(3, 259, length).tolist(), EOS] for length in rng.integers(33, 47, count)]


def asked(count):
    """Real texts: with blanks, with a mode token, and as they are."""
    texts = real_texts(count)
    return [cloze(text)[0] if i % 3 else text for i, text in enumerate(texts)], [
        "R" if i % 4 == 0 else None for i in range(count)
    ]


def theirs(hf, rows, **options):
    """Token ids [B, N, …] up to EOS, and the scores where beams were searched."""
    inputs = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for row, ids in zip(inputs, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    with torch.inference_mode():
        found = hf.generate(
            input_ids=inputs, attention_mask=inputs > 0, max_new_tokens=LENGTH, do_sample=False, output_scores=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
    several = [
        ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in (row[1:].tolist() for row in found.sequences)
    ]
    count = options.get("num_return_sequences", 1)
    scores = found.sequences_scores.view(-1, count).tolist() if options["num_beams"] > 1 else None
    return [several[i : i + count] for i in range(0, len(several), count)], scores


def compare(pair, rows, decoding):
    """(rows with the same answers, rows where a tie was decided otherwise, ours); fails at any other difference."""
    model, hf = pair
    ours = model._predictor.generate(rows, decoding, LENGTH)
    expected, scores = theirs(
        hf, rows, num_beams=decoding.num_beams, length_penalty=decoding.length_penalty,
        num_return_sequences=decoding.num_samples, early_stopping=False,
    )  # fmt: skip
    equal, ties = 0, 0
    for i, (answers, others) in enumerate(zip(ours, expected, strict=True)):
        if [answer.ids for answer in answers] == others:
            equal += 1
            if scores:
                penalized = [sum(a.log_probabilities) / len(a.ids) ** decoding.length_penalty for a in answers]
                assert penalized == pytest.approx(scores[i], rel=1e-4, abs=1e-4)
            continue
        both = model._predictor.score([(rows[i], answer.ids) for answer in answers] + [(rows[i], o) for o in others])
        values = np.array([s.log_likelihood / len(s.log_likelihoods) ** decoding.length_penalty for s in both])
        one, other = np.split(values, 2)
        assert np.abs(one - other).max() <= TIE, f"row {i}: {answers} {others} {values}"
        ties += 1
    return equal, ties, ours


BEAMS = {
    "greedy": Decoding(),
    "beam-4": Decoding(num_beams=4),
    "beam-4 short": Decoding(num_beams=4, length_penalty=0.6),
    "beam-3 all, shortest": Decoding(num_beams=3, length_penalty=-0.5, num_samples=3),
    "beam-2 sums": Decoding(num_beams=2, length_penalty=0.0),
}


@pytest.mark.parametrize("name", ["greedy", "beam-4 short", "beam-3 all, shortest"])
def test_answers_are_transformers(pair, name):
    equal, ties, ours = compare(pair, random_rows(16), BEAMS[name])
    assert equal + ties == 16
    assert ties <= 1
    check_variety(ours)


def check_variety(answers):
    lengths, texts = ({measure(one.ids) for several in answers for one in several} for measure in (len, tuple))
    assert len(lengths) > 2, f"all answers have {lengths} tokens: this would prove little"
    assert len(texts) > 4, "the answers are nearly all the same"


@pytest.mark.slow
@pytest.mark.parametrize("name", BEAMS)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_answers_to_two_hundred_texts_are_transformers(kind, name, trained):
    model, _ = trained[kind]
    texts, modes = asked(200)
    rows = [model.prompt(text, mode=mode).ids for text, mode in zip(texts, modes, strict=True)]
    equal, ties, ours = compare(trained[kind], rows, BEAMS[name])
    print(f"{kind}, {name}: {equal} of 200 equal, {ties} ties; first: {model.vocabulary.decode(ours[1][0].ids)}")
    assert equal + ties == 200
    assert ties <= 4
    check_variety(ours)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    words = vocabulary(tmp_path_factory.mktemp("vocabulary"), size=2000)
    pairs = {}
    for kind, config in (("tied", V10), ("untied", V11)):
        folder = save_hf(train(config, words, steps=600, learning_rate=2e-3), tmp_path_factory.mktemp("hf") / kind)
        hf = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        pairs[kind] = api.load(folder, batch_size=8), hf
    return pairs


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 5, None),
        (0.7, None, 0.9),
        (1.5, 50, 0.5),
        (1.0, 1, None),
        (1.0, None, 1e-6),
        (1.0, None, 1.0),
        (1.0, 999, None),
    ],
)
def test_truncation_is_transformers(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 3, (64, 500)).astype(np.float32)
    logits[:, -20:] = -np.inf
    expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = np.asarray(truncate(jnp.asarray(logits) / temperature, top_k, top_p))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_tokens_are_drawn_by_their_probabilities():
    logits = jnp.asarray([0.0, 1.0, 2.0, 3.0, -1.0, 9.0])
    allowed = jnp.arange(6) < 5
    keys = jax.random.split(jax.random.key(0), 20_000)
    rows = jnp.broadcast_to(logits, (len(keys), 6))
    tokens, log_probabilities = choose(rows, allowed, Sampling(keys, temperature=2.0, top_k=4), jnp.int32(3))
    drawn = np.bincount(np.asarray(tokens), minlength=6) / len(keys)
    expected = np.append(np.asarray(jax.nn.softmax(logits[:4] / 2.0)), [0, 0])
    assert np.abs(drawn - expected).max() < 4 * 0.5 / np.sqrt(len(keys))
    # What is reported is the model's own, over all ids.
    np.testing.assert_allclose(log_probabilities, jax.nn.log_softmax(logits)[tokens], rtol=1e-5)


def test_a_draw_depends_on_its_seed_and_number_alone(pair):
    predictor = pair[0]._predictor
    rows, drawn = random_rows(5), Decoding(temperature=1.0, top_p=0.95, num_samples=3, seed=7)

    def ids(rows, decoding, numbers):
        return [[one.ids for one in several] for several in predictor.generate(rows, decoding, 10, numbers)]

    together = ids(rows, drawn, range(5))
    assert together[3:] == ids(rows[3:] * 4, drawn, [3, 4] * 4)[:2]
    assert len({tuple(one) for several in together for one in several}) > 5
    assert ids(rows, dataclasses.replace(drawn, seed=8), range(5)) != together


def test_a_stream_is_the_answer_token_by_token(pair):
    model, _ = pair
    text = "слово о полку"
    for decoding in (Decoding(), Decoding(temperature=0.9, top_k=20, seed=3)):
        whole = model.generate([text], decoding, max_length=8)[0].answers[0]
        parts = list(model.stream(text, decoding, max_length=8))
        assert [part.tokens for part in parts] == [whole.tokens[: n + 1] for n in range(len(whole.tokens))]
        assert parts[-1].text == whole.text
        assert parts[-1].token_log_probabilities == pytest.approx(whole.token_log_probabilities, abs=1e-4)
    with pytest.raises(UserError, match="beam search gives no token before its end"):
        model.stream(text, Decoding(num_beams=2))
