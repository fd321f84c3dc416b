"""seqio preprocessors of our own: a wrapper of the NumPy code that training itself uses without seqio."""

from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from vikhr_t5.data.denoisers import Codes, Denoiser, IntArray, Window, check, corrupt, longest_window, mixture, to_json
from vikhr_t5.data.vocabulary import AnyVocabulary, ByteVocabulary, Vocabulary
from vikhr_t5.errors import UserError

_SPLITS = (np.arange(16) + 0.5) / 16  # the points that stand for a random split


def to_instructions(
    dataset: tf.data.Dataset,
    make: Callable[..., Iterable[tuple[str, str]]],
    fields: Sequence[str],
    task_name: str | None = None,
) -> tf.data.Dataset:
    """Rows -> {inputs, targets} as a function of Python makes them: any number of examples of one row.

    Args:
        make: gives (inputs, targets) of the texts of a row's `fields`, in the order of its arguments.
        task_name: the field that each example takes over from its row, as the feature `task_name`.
    """

    def texts(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = [list(make(*(value.decode() for value in row))) for row in zip(*columns, strict=True)]
        made = [example for row in rows for example in row]
        inputs, targets = (np.array([example[side] for example in made], object) for side in (0, 1))
        return inputs, targets, np.array([len(row) for row in rows], np.int64)

    def batch(rows: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        types = [tf.string, tf.string, tf.int64]
        inputs, targets, counts = tf.numpy_function(texts, [rows[field] for field in fields], types)
        counts = tf.ensure_shape(counts, [None])
        examples = {"inputs": tf.ensure_shape(inputs, [None]), "targets": tf.ensure_shape(targets, [None])}
        return examples if task_name is None else {**examples, "task_name": tf.repeat(rows[task_name], counts)}

    return dataset.batch(64).map(batch).unbatch()


class Denoise:
    """Documents of tokens in `targets` -> corrupted windows in `inputs` and `targets`, each ending in EOS.

    Documents are laid end to end and cut into windows, each as long as the denoiser drawn for it lets fit the sequence
    lengths. Denoisers are drawn so that each has its weight's share of the input tokens. seqio's `seed` makes it
    repeatable, and every epoch is corrupted anew. What does not fill a window at the end of the last epoch is dropped.

        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            Denoise("ul2"),
        ]

    Args:
        denoisers: the name of a mixture, or denoisers of one's own.
    """

    def __init__(self, denoisers: str | Sequence[Denoiser]):
        self.denoisers = mixture(denoisers)

    def post_cache_transform(self) -> dict[str, Any]:
        """The mixture as JSON. A preprocessor with this method is not cached: the token store's reader applies it."""
        return to_json(self.denoisers)

    def __call__(
        self,
        dataset: tf.data.Dataset,
        sequence_length: Mapping[str, int] | None,
        output_features: Mapping[str, seqio.Feature],
    ) -> tf.data.Dataset:
        """Called by seqio. UserError where the lengths or the vocabulary do not suffice for the mixture."""
        if not sequence_length or not {"inputs", "targets"} <= set(sequence_length):
            raise UserError(f"denoising needs sequence_length for inputs and targets; got {sequence_length}")
        lengths = sequence_length["inputs"], sequence_length["targets"]
        codes = Codes.of(_vocabulary(output_features["targets"]), self.denoisers)
        check(self.denoisers, codes, *lengths)
        cutter = _Cutter(self.denoisers, codes, *lengths, key=_seqio_seed())

        def cut(state: tuple[tf.Tensor, tf.Tensor], document: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], Any]:
            types = [tf.int32, tf.int64, tf.int32, tf.int64, tf.int32, tf.int64]
            left, number, *sides = tf.numpy_function(cutter, [*state, document], types, stateful=False)
            inputs, inputs_rows, targets, targets_rows = (tf.ensure_shape(side, [None]) for side in sides)
            windows = {
                "inputs": tf.RaggedTensor.from_row_lengths(inputs, inputs_rows),
                "targets": tf.RaggedTensor.from_row_lengths(targets, targets_rows),
            }
            return (tf.ensure_shape(left, [None]), tf.ensure_shape(number, [])), windows

        documents = dataset.map(lambda example: tf.cast(example["targets"], tf.int32))
        windows = documents.scan((tf.zeros([0], tf.int32), tf.constant(0, tf.int64)), cut)
        return windows.flat_map(tf.data.Dataset.from_tensor_slices)


class _Cutter:
    """Cuts and corrupts the windows of a stream of tokens, document by document.

    Window number n depends on its text, `key` (uint64 [2]) and n alone.
    """

    def __init__(
        self, denoisers: Sequence[Denoiser], codes: Codes, inputs_length: int, targets_length: int, key: np.ndarray
    ):
        self.denoisers, self.codes, self.lengths, self.key = denoisers, codes, (inputs_length, targets_length), key
        # A share of input tokens, over the inputs of a window, is a share of windows; added up, to draw from.
        inputs = [np.mean([self._window(denoiser, split).inputs for split in _SPLITS]) for denoiser in denoisers]
        self.shares = list(accumulate(d.weight / length for d, length in zip(denoisers, inputs, strict=True)))

    def _window(self, denoiser: Denoiser, split: float) -> Window:
        return longest_window(denoiser.drawn(split), *self.lengths)

    def __call__(self, left: IntArray, number: int, document: IntArray) -> tuple[Any, ...]:
        """`left`: tokens that the documents before left over; `number`: of the next window.

        Returns:
            The same two for the next document; then inputs and targets, each as its rows laid end to end, int32, and
            the lengths of the rows, int64.
        """
        tokens, start = np.concatenate((left, document)), 0
        rows = [(np.empty(0, np.int32), np.empty(0, np.int32))]
        while True:
            counter = np.array([0, 0, number, 0], np.uint64)
            rng = np.random.Generator(np.random.Philox(key=self.key, counter=counter))
            denoiser = self.denoisers[bisect(self.shares, rng.uniform(0, self.shares[-1]), hi=len(self.shares) - 1)]
            window = self._window(denoiser, _SPLITS[int(rng.uniform(0, _SPLITS.size))])
            if start + window.raw > tokens.size:
                break
            rows.append(corrupt(tokens[start : start + window.raw], denoiser, window, rng, self.codes))
            start, number = start + window.raw, number + 1
        inputs, targets = zip(*rows, strict=True)
        return tokens[start:], np.int64(number), *_flat(inputs), *_flat(targets)


def _flat(rows: Sequence[IntArray]) -> tuple[np.ndarray, np.ndarray]:
    """All rows end to end, and their lengths; the first row is an empty one, so that there is something to join."""
    return np.concatenate(rows), np.array([row.size for row in rows[1:]], np.int64)


def _seqio_seed() -> np.ndarray:
    """uint64 [2], the next seed that seqio gives to a preprocessor: from `get_dataset(seed=…)`, else a random one."""
    take_seed = seqio.map_over_dataset(lambda _, seed: seed, num_seeds=1)
    return np.array(next(take_seed(tf.data.Dataset.from_tensors(0)).as_numpy_iterator())).view(np.uint64)


def _vocabulary(feature: seqio.Feature) -> AnyVocabulary:
    if isinstance(feature.vocabulary, seqio.ByteVocabulary):
        return ByteVocabulary(feature.vocabulary.extra_ids)
    if not isinstance(feature.vocabulary, seqio.SentencePieceVocabulary):
        raise UserError(
            f"denoising needs a SentencePieceVocabulary or ByteVocabulary in output_features; got {feature.vocabulary}"
        )
    return Vocabulary(feature.vocabulary.sentencepiece_model_file, feature.vocabulary.extra_ids)
