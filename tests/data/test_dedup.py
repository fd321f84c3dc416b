"""Duplicates: signatures against datasketch and Jaccard's own definition, the decision against datasketch's LSH."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import datasketch
import numpy as np
import pytest
import seqio
from cached_tasks import digests, files, store_of

from vikhr_t5.data import cache as cache_module
from vikhr_t5.data.dedup import BANDS, NUM_PERM, THRESHOLD, Signatures, method, normalised, shingles
from vikhr_t5.errors import UserError

WORDS = [f"слово{number}" for number in range(3000)]


def changed(words: list[str], share: float, chance: random.Random) -> list[str]:
    """Some words replaced: with 5-word shingles, a Jaccard index of about (1 - share)⁵ / (2 - (1 - share)⁵)."""
    return [chance.choice(WORDS) if chance.random() < share else word for word in words]


@pytest.fixture(scope="module")
def texts() -> list[bytes]:
    """300 documents in families of 1 to 4 that differ by 0 to 6% of the words; shuffled."""
    chance, found = random.Random(7), []
    while len(found) < 300:
        words = chance.choices(WORDS, k=chance.randrange(3, 300))
        found += [
            words,
            *(changed(words, chance.choice((0, 0.005, 0.02, 0.06)), chance) for _ in range(len(found) % 4)),
        ]
    chance.shuffle(found)
    return [" ".join(words).encode() for words in found]


def signed(folder: Path, kind: str, texts: list[bytes], parts: int = 3) -> Signatures:
    paths = [folder / f"{kind}-{part}" for part in range(parts)]
    for path, some in zip(paths, np.array_split(np.array(texts, object), parts), strict=True):
        path.write_bytes(b"".join(method(kind).sign(text).tobytes() for text in some))
    return Signatures(paths, method(kind))


def test_the_words_alone_count():
    assert normalised("Ёлка — «ЗЕЛЁНАЯ»,\n\tёлка!".encode()) == ["ёлка", "зелёная", "ёлка"]
    assert normalised("ﬁne №5".encode()) == ["fine", "no5"]
    assert normalised("е\u0308ж".encode()) == ["ёж"]
    assert normalised(b"!!!") != normalised(b"???")


def test_exact(tmp_path):
    texts = ["Раз, два.", "три", "раз два", "", "раз  ДВА", "три четыре", "три", "!"]
    goes = method("exact").duplicates(signed(tmp_path, "exact", [text.encode() for text in texts]))
    assert goes.tolist() == [False, False, True, False, True, False, True, False]


def test_signatures_estimate_the_jaccard_index(texts):
    """Within five standard deviations of 128 trials, each pair; and without bias over all of them."""
    chance, errors = random.Random(1), []
    for text in texts[:100]:
        words = text.decode().split()
        other = changed(words, chance.uniform(0, 0.2), chance)
        runs = [set(zip(*(w[i:] for i in range(min(5, len(words)))), strict=False)) for w in (words, other)]
        jaccard = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        estimate = np.mean(method("minhash").sign(text) == method("minhash").sign(" ".join(other).encode()))
        assert abs(estimate - jaccard) <= 5 * (jaccard * (1 - jaccard) / NUM_PERM) ** 0.5 + 1e-9
        errors.append(estimate - jaccard)
    assert abs(np.mean(errors)) < 0.015


def test_signatures_are_datasketchs(texts):
    sketch = datasketch.MinHash(NUM_PERM, seed=1, hashfunc=int, scheme="affine32")
    for shingle in shingles(normalised(texts[0])):
        sketch.update(shingle)
    assert method("minhash").sign(texts[0]).tolist() == sketch.hashvalues.tolist()


def test_near_duplicates_are_those_of_datasketchs_lsh(tmp_path, texts):
    signatures = signed(tmp_path, "minhash", texts)
    goes = method("minhash").duplicates(signatures)
    lsh = datasketch.MinHashLSH(params=(BANDS, NUM_PERM // BANDS), num_perm=NUM_PERM)
    sketches, expected = [], []
    for number, values in enumerate(signatures[np.arange(len(texts))]):
        sketch = datasketch.MinHash(NUM_PERM, hashvalues=values, seed=1, hashfunc=int, scheme="affine32")
        expected.append(any(sketch.jaccard(sketches[other]) >= THRESHOLD for other in lsh.query(sketch)))
        lsh.insert(number, sketch)
        sketches.append(sketch)
    assert goes.tolist() == expected
    assert 60 < goes.sum() < 180


def test_one_text_a_thousand_times(tmp_path):
    signatures = signed(tmp_path, "minhash", [b"one and the same text of a few words"] * 1000 + [b"and another"])
    goes = method("minhash").duplicates(signatures)
    assert np.flatnonzero(~goes).tolist() == [0, 1000]


def test_no_documents(tmp_path):
    for kind in ("exact", "minhash"):
        assert method(kind).duplicates(signed(tmp_path, kind, [])).tolist() == []


# ---- in the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def repeated(data: Path) -> list[str]:
    """The pages twice: the second time every other one is changed in spacing and case, the rest in one word of many."""
    pages = [page for page in (data / "pages.txt").read_text("utf-8").split("\n\n") if len(page.split()) > 150]
    again = [
        p.upper().replace(" ", "  ") if i % 2 else p.replace(p.split()[9], "иначе", 1) for i, p in enumerate(pages)
    ]
    (data / "pages.txt").write_text("\n\n".join([*pages, *again]), encoding="utf-8")
    return pages


@pytest.mark.parametrize("kind", ["exact", "minhash"])
def test_the_first_of_the_documents_stays(module: Callable[..., str], repeated, kind):
    name = module(piece_bytes=60_000)
    task = f"{name}_text"
    cache_module.cache(task, name, "all", splits=["train"])
    everything = store_of(task, cache_dir="all")
    assert len(everything.manifest.shards) > 3
    texts = [e["text"].decode().lower().split() for e in seqio.TaskRegistry.get(task).source.examples("train")]
    same = [tuple(words[10:] if kind == "minhash" else words) for words in texts]
    expected = [i for i, text in enumerate(same) if text not in same[:i]]
    assert 5 <= len(texts) - len(expected) < len(texts) / 2
    manifest = cache_module.cache(task, name, "cache", splits=["train"], dedup_method=kind)[task]["train"]
    store = store_of(task)
    assert [store.example(i)["targets"].tolist() for i in range(len(store))] == [
        everything.example(i)["targets"].tolist() for i in expected
    ]
    assert manifest.dropped == {"duplicate": len(texts) - len(expected)}
    assert manifest.num_read == len(texts)
    assert manifest.dedup == method(kind).parameters
    assert sorted(path.name for path in store.directory.iterdir()) == ["manifest.json", *sorted(files(task))]


def test_pairs_and_their_names_stay_together(module: Callable[..., str], data):
    lines = (data / "pairs.jsonl").read_text("utf-8").splitlines()[:60]
    (data / "pairs.jsonl").write_text("\n".join([*lines, *lines[10:30]]), encoding="utf-8")
    name = module("""
def name(pair): return {**pair, "task_name": tf.strings.substr(pair["inputs"], 0, 2)}
named = lambda dataset: dataset.map(name)
add(NAME + "_x", source=pairs, preprocessors=[to_both, named, tokenize, append_eos])
""")
    manifest = cache_module.cache(f"{name}_x", name, "cache", dedup_method="exact")[f"{name}_x"]["train"]
    assert manifest.dropped["duplicate"] >= 20
    store = store_of(f"{name}_x")
    assert len(store) == 80 - manifest.dropped["duplicate"] == len(store.names[0])
    texts = [json.loads(line)["ru"] for line in lines]
    assert [store.names[1][i] for i in store.names[0]][:5] == [text.encode()[:2].decode() for text in texts[:5]]


def test_the_trainer_keeps_the_deduplication(module: Callable[..., str], repeated, data, capfd):
    name = module()
    task = f"{name}_text"
    cache_module.cache(task, name, "cache", splits=["train"], dedup_method="exact")
    deduplicated = digests(task)
    assert "is cached again" not in capfd.readouterr().err
    cache_module.cache(task, name, "cache", splits=["train"])
    assert digests(task) == deduplicated
    (data / "more.txt").write_text("новая страница\n\nновая страница", encoding="utf-8")
    manifest = cache_module.cache(task, name, "cache", splits=["train"])[task]["train"]
    assert manifest.dedup == {"method": "exact"}
    assert "is cached again: its files have changed" in capfd.readouterr().err
    manifest = cache_module.cache(task, name, "cache", splits=["train"], dedup_method="none")[task]["train"]
    assert manifest.dedup is None
    assert "is cached again: deduplication was method=exact and is none" in capfd.readouterr().err


def test_what_cannot_be_compared(module: Callable[..., str], monkeypatch):
    name = module('add(NAME + "_x", source=pairs, preprocessors=[to_both, tokenize, append_eos, tokenize])')
    with pytest.raises(UserError, match="--dedup compares texts, and its preprocessors do not end with"):
        cache_module.cache(f"{name}_x", name, "cache", dedup_method="exact")
    with pytest.raises(UserError, match="--dedup minhsh: nearest: minhash, or none"):
        cache_module.cache(f"{name}_x", name, "cache", dedup_method="minhsh")
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match="--dedup minhash needs datasketch: pip install"):
        cache_module.cache(f"{name}_x", name, "cache", dedup_method="minhash")
