"""A Mistral-like SentencePiece model as the files of a Hugging Face tokenizer: the same ids for the same text.

What tokenizer.json says:

- normalizer: a "▁" in front, "▁" for spaces. As in Mistral's own file, a text is cut at special tokens first, and each
  part gets its "▁".
- pre-tokenizer: a cut before each run of "▁". No piece crosses it, since only runs of "▁" have one that is not first;
  it lets the cache work.
- model: BPE with all pairs that make a piece, those of the highest score first. SentencePiece decides ties of score by
  place, `tokenizers` knows none. Runs of "▁" all have one score in Mistral's model; with longer left sides first,
  `tokenizers` takes the first place, too.
- decoder: "▁" to spaces, bytes to characters, and one space off the front.

What differs: `<s>`, `</s>` and `<unk>` written in a text become those ids, as chat templates need. With
`split_special_tokens=True` a call reads them as text, which is what SentencePiece does.
"""

from pathlib import Path
from typing import Any

from conversion.tokenizer_json import merges
from vikhr_mistral.pieces import CONTROL, FILE, SPACE
from vikhr_t5.files import write_json

FILES = (FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write(model: Any, folder: Path) -> None:
    """Writes FILES into an existing folder.

    Args:
        model: a SentencePiece `ModelProto` that `pieces.check_base` lets pass.
        folder: also that of a model; `AutoTokenizer.from_pretrained` reads it with no code of ours.
    """
    spec = model.trainer_spec
    named = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    special = {key: model.pieces[id].piece for key, id in named.items() if id >= 0}
    config = {
        # Not LlamaTokenizer: that class builds its own normalizer and merges from the list of pieces.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": "bos_token" in special,
        "add_eos_token": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / FILE).write_bytes(model.SerializeToString())
    for name, value in (
        ("tokenizer.json", tokenizer_json(model)),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        write_json(folder / name, value)


def tokenizer_json(model: Any) -> dict[str, Any]:
    """The content of tokenizer.json; see the head of this file."""
    spec, prefix = model.trainer_spec, model.normalizer_spec.add_dummy_prefix
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    normalizers = [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), to_mark]
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    cut = {"type": "Split", "pattern": {"Regex": f"{SPACE}+"}, "behavior": "MergedWithNext", "invert": False}
    named = [(id, piece) for id, piece in enumerate(model.pieces) if piece.type == CONTROL or id == spec.unk_id]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(id, piece.piece) for id, piece in named],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": cut,
        "post_processor": _post_processor(model),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: id for id, piece in enumerate(model.pieces)},
            "merges": merges(model),
        },
    }


def _special_token(id: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": name, **flags}


def _post_processor(model: Any) -> dict[str, Any]:
    """BOS before each text."""
    bos_id = model.trainer_spec.bos_id
    single, pair = [{"Sequence": {"id": "A", "type_id": 0}}], [{"Sequence": {"id": "B", "type_id": 0}}]
    special: dict[str, Any] = {}
    if bos_id >= 0:
        bos = model.pieces[bos_id].piece
        start = [{"SpecialToken": {"id": bos, "type_id": 0}}]
        single, pair = start + single, start + pair
        special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": single, "pair": single + pair, "special_tokens": special}
