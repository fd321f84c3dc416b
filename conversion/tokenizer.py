"""A vocabulary as the files of a Hugging Face tokenizer, and back.

What the folders of released models hold, and what their sentinels are here:

- T5, FLAN-T5, T5 v1.1: spiece.model of 32,000 pieces; the configuration names 100 sentinels, which stand above them,
  `<extra_id_0>` the highest, 32099: `Vocabulary(file, 100)`.
- mT5: spiece.model of 250,100 pieces; the last are "▁<extra_id_99>" … "▁<extra_id_0>", 250099: `Vocabulary(file, 0)`.
- umT5: spiece.model of 256,000 pieces; 300 sentinels are added, `<extra_id_0>` as 256299: `Vocabulary(file, 300)`.
- ByT5: no file. transformers counts the sentinels up from 259, in rows that were never trained; see byte_vocabulary.py:
  `ByteVocabulary(0)`, whose `<extra_id_0>` is 258. The folder written for it says so, and transformers then agrees.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conversion.tokenizer_json import added_tokens, tokenizer_json
from vikhr_t5.data.vocabulary import AnyVocabulary, ByteVocabulary, Vocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.files import write_json

_SENTINEL = re.compile(r"<extra_id_([0-9]+)>")
_DEFAULT = 100  # sentinels of transformers' T5Tokenizer where nothing is said
_BYT5_SENTINEL = ByteVocabulary().size  # transformers' id of <extra_id_0>: after the bytes


def write(vocabulary: AnyVocabulary, folder: Path) -> None:
    """Writes tokenizer_config.json and special_tokens_map.json into `folder`, and spiece.model and tokenizer.json.

    Of bytes, the first two alone: transformers' ByT5Tokenizer has no other.

    Raises:
        UserError: the SentencePiece model has something that tokenizer.json cannot say; the line names it.
    """
    pad, eos, unk = (vocabulary.piece(i) for i in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id))
    named = {"pad_token": pad, "eos_token": eos, "unk_token": unk}
    config: dict[str, Any] = {}
    if isinstance(vocabulary, ByteVocabulary):
        others = [vocabulary.piece(i) for i in range(vocabulary.first_sentinel, vocabulary.last_sentinel - 1, -1)]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        ids = {0: pad, 1: eos, 2: unk, **{vocabulary.sentinel(i): name for i, name in enumerate(others)}}
        config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": len(others)}
        decoder = {str(id): {"content": name, **flags} for id, name in ids.items()}
    else:
        tokenizer = tokenizer_json(vocabulary)
        others = sorted(added_tokens(vocabulary), key=lambda name: not _SENTINEL.fullmatch(name))
        # Not T5Tokenizer: that class rebuilds its parts from the list of pieces, without the normalizer and the bytes.
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        decoder = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in tokenizer["added_tokens"]
        }
        (folder / "spiece.model").write_bytes(vocabulary.model_bytes)
        write_json(folder / "tokenizer.json", tokenizer)
    config |= {
        **named,
        "additional_special_tokens": others,
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {**named, "additional_special_tokens": others})


def read(folder: Path) -> AnyVocabulary:
    """The vocabulary of a Hugging Face model's folder, with sentinels of the ids that the model was trained with.

    Raises:
        UserError: there is neither spiece.model nor a ByT5 tokenizer's configuration; the folder adds tokens that no
            vocabulary here can have; a file is damaged.
    """
    config = _json(folder / "tokenizer_config.json")
    added = dict(_added_ids(folder, config))
    if (folder / "spiece.model").exists():
        return _sentencepiece(folder, config, added)
    classes = config.get("tokenizer_class"), _json(folder / "config.json").get("tokenizer_class")
    if "ByT5Tokenizer" in classes:
        return _bytes(folder, added)
    raise UserError(
        f"{folder}: no spiece.model (nor a tokenizer_config.json of ByT5Tokenizer): copy it from the original model"
        ", or give --vocabulary; transformers 5 saves tokenizer.json alone, which does not hold all of it"
    )


def _sentencepiece(folder: Path, config: Mapping[str, Any], added: Mapping[str, int]) -> Vocabulary:
    file = str(folder / "spiece.model")
    vocabulary = Vocabulary(file, extra_ids=0)
    if not vocabulary.num_sentinels:
        listed = {name for name in [*added, *_special(folder, config)] if _SENTINEL.fullmatch(name)}
        vocabulary = Vocabulary(file, len(listed) or int(config.get("extra_ids", _DEFAULT)))
        _check(folder, _sentinels(added), vocabulary)
    others = {name: id for name, id in added.items() if id >= vocabulary.size and not _SENTINEL.fullmatch(name)}
    if others:
        name, id = next(iter(others.items()))
        raise UserError(
            f"{folder}: token {name!r} (id {id}; {len(others)} such) was added to the tokenizer and is in no"
            " spiece.model: a vocabulary here is that file and its sentinels; remove it from the tokenizer's files if"
            " the model does not need it"
        )
    return vocabulary


def _bytes(folder: Path, added: Mapping[str, int]) -> ByteVocabulary:
    sentinels = _sentinels(added)
    if len(sentinels) != 1 and all(id == _BYT5_SENTINEL + number for number, id in sentinels.items()):
        return ByteVocabulary()
    vocabulary = ByteVocabulary(max(0, max(sentinels.values()) + 1 - _BYT5_SENTINEL))
    _check(folder, sentinels, vocabulary)
    return vocabulary


def _sentinels(added: Mapping[str, int]) -> dict[int, int]:
    """Number of a sentinel -> its id."""
    return {int(match[1]): id for name, id in added.items() if (match := _SENTINEL.fullmatch(name))}


def _check(folder: Path, sentinels: Mapping[int, int], vocabulary: AnyVocabulary) -> None:
    for number, id in sentinels.items():
        if id != vocabulary.first_sentinel - number:
            raise UserError(
                f"{folder}: its tokenizer gives <extra_id_{number}> the id {id}; sentinels descend from the highest"
                f" id, which makes it {vocabulary.first_sentinel - number}: number them so in tokenizer_config.json"
            )


def _added_ids(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Name -> id of added tokens, wherever transformers 4 or 5 wrote them; what comes later counts."""
    yield from ((token["content"], token["id"]) for token in _json(folder / "tokenizer.json").get("added_tokens", ()))
    yield from _json(folder / "added_tokens.json").items()
    yield from ((token["content"], int(id)) for id, token in config.get("added_tokens_decoder", {}).items())


def _special(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Names of special tokens; transformers 5 calls them "extra_special_tokens"."""
    for source in (config, _json(folder / "special_tokens_map.json")):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            for token in source.get(key) or ():
                yield token["content"] if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object; download it again")
    return value
