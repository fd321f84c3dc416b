"""`vikhr-t5 infer --gin_file`: predictions, or scores of given targets, for a seqio task, as JSON lines."""

import itertools
import json
from typing import Any

from vikhr_t5 import inference, task_examples
from vikhr_t5.data.pipeline import DatasetConfig
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path, write_text_atomic
from vikhr_t5.inference import Decoding
from vikhr_t5.progress import Progress
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.state import EncoderDecoderModel

MODES = ("predict", "score")
GREEDY = Decoding()


def infer(
    mode: str,
    model: EncoderDecoderModel,
    dataset_cfg: DatasetConfig,
    restore_checkpoint_cfg: RestoreCheckpointConfig,
    partitioner: Partitioner,
    output_dir: str,
    shard_id: int = 0,
    num_shards: int = 1,
    dtype: str = "float32",
    decoding: Decoding = GREEDY,
    config_text: str = "",
) -> list[str]:
    """Write `<task>-<mode>.jsonl-<shard>-of-<shards>` (t5x's name) for every task of `dataset_cfg`, whole or not.

    A line is {"inputs": {feature: text}, "prediction": text}, of several answers "predictions": [text, …], or, of mode
    "score", {"inputs": …, "score": the sum of log-likelihoods of the target's tokens}. UTF-8, not escaped, in the order
    of the dataset.

    Args:
      mode: "predict" or "score".
      shard_id, num_shards: every `num_shards`-th example from number `shard_id` on.
      dtype: see `inference.restored`.
      decoding: how predictions are found.
      config_text: the gin configuration; goes into the folder.

    Returns:
      The files written.

    Raises:
      UserError: whatever the person who launched it can mend.
    """
    if mode not in MODES:
        raise UserError(f"infer.mode {mode!r} is unknown ({nearest(mode, MODES)})")
    if not 0 <= shard_id < num_shards:
        raise UserError(f"infer.shard_id {shard_id} is not one of {num_shards}: give 0 to {num_shards - 1}")
    if dataset_cfg.task_feature_lengths is None:
        raise UserError("infer needs lengths: set TASK_FEATURE_LENGTHS, like {'inputs': 512, 'targets': 240}")
    lengths = dict(dataset_cfg.task_feature_lengths)
    predictor, _ = inference.restored(model, partitioner, restore_checkpoint_cfg, dataset_cfg.batch_size, dtype)
    tasks = task_examples.open_tasks(dataset_cfg, model.vocabulary)
    folder = task_examples.output_folder(output_dir)
    if config_text:
        write_text_atomic(folder / "config.gin", config_text)
    written = []
    for task in tasks:
        examples = itertools.islice(task_examples.examples(task, dataset_cfg), shard_id, None, num_shards)
        path = folder / f"{task.name}-{mode}.jsonl-{shard_id:05d}-of-{num_shards:05d}"
        with (
            atomic_path(path) as temporary,
            open(temporary, "w", encoding="utf-8") as file,
            Progress(task.name, None, "examples") as bar,
        ):
            done = 0
            while batch := list(itertools.islice(examples, dataset_cfg.batch_size)):
                answers: list[dict[str, Any]]
                pairs = task_examples.pairs(batch, lengths)
                if mode == "predict":
                    places = range(done, done + len(batch))
                    found = predictor.generate([inputs for inputs, _ in pairs], decoding, lengths["targets"], places)
                    answers = [_predicted([model.vocabulary.decode(one.ids) for one in several]) for several in found]
                else:
                    answers = [{"score": score.log_likelihood} for score in predictor.score(pairs)]
                done += len(batch)
                for example, answer in zip(batch, answers, strict=True):
                    line = {"inputs": task_examples.plain(example, model.vocabulary), **answer}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                bar.advance(len(batch))
        print(f"written: {path}", flush=True)
        written.append(str(path))
    return written


def _predicted(texts: list[str]) -> dict[str, Any]:
    return {"prediction": texts[0]} if len(texts) == 1 else {"predictions": texts}
