"""Modules of seqio tasks for the tests of caching, on a little real text, and what is cached of them in ./cache."""

import importlib
from pathlib import Path

from vikhr_t5.data.store import TokenStore, task_directory

DEMO = Path(__file__).parents[1] / "tasks" / "demo_data"
HEADER = """
import functools, seqio, tensorflow as tf
from seqio.preprocessors import append_eos, append_eos_after_trim, rekey, tokenize
from vikhr_t5.data import sources
from vikhr_t5.data.sources import JsonLinesSource, TextSource
sources.PIECE_BYTES = {piece_bytes}
DATA = {data!r}
vocabulary = seqio.SentencePieceVocabulary({model!r}, extra_ids={extra_ids})
features = {{name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}}
text = TextSource({{"train": DATA + "/*.txt", "validation": DATA + "/*.txt"}}, belongs=sources.held_out("text", 0.1))
pairs = JsonLinesSource({{"train": DATA + "/*.jsonl"}}, ["ru", "en"])
to_targets = functools.partial(rekey, key_map={{"targets": "text"}})
to_both = functools.partial(rekey, key_map={{"inputs": "ru", "targets": "en"}})
placeholder = seqio.CacheDatasetPlaceholder()
class Later:
    def __call__(self, dataset): raise AssertionError("applied after the cache")
    def post_cache_transform(self): return {{"name": "later"}}
add = functools.partial(seqio.TaskRegistry.add, output_features=features)
"""
TASKS = """
add(NAME + "_text", source=text, preprocessors=[to_targets, tokenize, placeholder, Later()])
add(NAME + "_pairs", source=pairs, preprocessors=[to_both, tokenize, placeholder, append_eos])
"""


def write_data(folder: Path, pages: int = 120, pairs: int = 300) -> None:
    """A few pages, a few pairs."""
    folder.mkdir()
    texts = (DEMO / "ru.txt").read_text(encoding="utf-8").split("\n\n")[:pages]
    (folder / "pages.txt").write_text("\n\n".join(texts), encoding="utf-8")
    with open(DEMO / "parallel.jsonl", encoding="utf-8") as lines:
        (folder / "pairs.jsonl").write_text("".join(next(lines) for _ in range(pairs)), encoding="utf-8")


def write_module(
    folder: Path, data: Path, model: str, text: str = TASKS, piece_bytes: int = 1 << 20, extra_ids: int = 300
) -> str:
    """A module in `folder`; gives its name, which no other test has. `NAME` in its text is that name."""
    name = f"tasks_of_{abs(hash(str(folder)))}"
    header = HEADER.format(piece_bytes=piece_bytes, data=str(data), model=model, extra_ids=extra_ids)
    (folder / f"{name}.py").write_text(f"NAME = {name!r}\n{header}{text}", encoding="utf-8")
    importlib.invalidate_caches()
    return name


def store_of(task: str, split: str = "train", cache_dir: str = "cache") -> TokenStore:
    return TokenStore(task_directory(cache_dir, task, split))


def digests(task: str, cache_dir: str = "cache") -> list[str]:
    return [shard.digest for shard in store_of(task, cache_dir=cache_dir).manifest.shards]


def files(task: str, cache_dir: str = "cache") -> dict[str, bytes]:
    """Name -> content of the shards."""
    store = store_of(task, cache_dir=cache_dir)
    return {shard.file: (store.directory / shard.file).read_bytes() for shard in store.manifest.shards}
