"""Translation models of Hugging Face: NLLB, MADLAD, Marian (opus-mt). Only here is said how each is told its languages.

NLLB      source language: set in the tokenizer; target language: forced as the first token; "eng_Latn", "rus_Cyrl"
MADLAD    a T5; target language: the token <2ru> before the text, "ru"; the source language is not said
Marian    one pair of languages, or several targets: the token >>rus<< before the text, "rus"
"""

from collections.abc import Sequence
from typing import Any

from vikhr_t5.errors import UserError, nearest


class TranslationModel:
    """A model and its tokenizer, for greedy or beam search.

    Args:
        model: a local folder, or a name on the hub.
        source_lang, target_lang: as the family names them (above); None where it needs none.
        batch_tokens: tokens of a batch, padding counted.
        max_tokens: longest text, in tokens; of a longer one `fits` is False.
        num_beams: 1 is greedy.
        device: None for a GPU where there is one.
        dtype: None for bfloat16 on a GPU and float32 elsewhere.

    Raises:
        UserError: no such model, one of another family, or a language that it does not know.
    """

    def __init__(
        self,
        model: str,
        source_lang: str | None,
        target_lang: str | None,
        batch_tokens: int = 4096,
        max_tokens: int = 200,
        num_beams: int = 1,
        device: str | None = None,
        dtype: str | None = None,
    ):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"translation needs torch and transformers: pip install 'vikhr-t5[hf]' ({error})"
            ) from error
        transformers.utils.logging.disable_progress_bar()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        self.settings = {  # what the translations depend on
            "model": model,
            "source_lang": source_lang,
            "target_lang": target_lang,
            "batch_tokens": batch_tokens,
            "max_tokens": max_tokens,
            "num_beams": num_beams,
            "dtype": dtype,
        }
        self._torch, self._batch_tokens, self._max_tokens, self._num_beams = torch, batch_tokens, max_tokens, num_beams
        options: dict[str, Any] = {"src_lang": source_lang} if source_lang else {}
        try:
            kind = transformers.AutoConfig.from_pretrained(model).model_type
            if kind not in _LANGUAGES:
                raise UserError(f"{model} is a {kind}: translate takes NLLB (m2m_100), MADLAD (t5) and Marian")
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(model, **options)
            loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(model, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise UserError(
                f"no translation model {model!r} ({str(error).splitlines()[0]}): give --model a local folder; where"
                " there is a network: hf download NAME --local-dir FOLDER"
            ) from error
        # A forced end would look like a model's own; the limit is set for each batch.
        loaded.generation_config.update(forced_eos_token_id=None, max_length=None)
        self._model = loaded.to(device).eval()
        self._prefix, forced = _LANGUAGES[kind](self._tokenizer, model, source_lang, target_lang)
        self._forced = {} if forced is None else {"forced_bos_token_id": forced}

    def fits(self, text: str) -> bool:
        """Whether a text is short enough to be translated whole."""
        return self._length(text) <= self._max_tokens

    def _length(self, text: str) -> int:
        return len(self._tokenizer(self._prefix + text).input_ids)

    def translate(self, texts: Sequence[str]) -> list[tuple[str, bool]]:
        """(translation, whether the model ended it itself) of each text: one line, without spaces around it."""
        done: dict[int, tuple[str, bool]] = {}
        for batch in self._batches([self._length(text) for text in texts]):
            done |= zip(batch, self._translate([texts[place] for place in batch]), strict=True)
        return [done[place] for place in range(len(texts))]

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Places of the texts, the longest first: what does not fit into memory is seen at once."""
        batches: list[list[int]] = []
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > self._batch_tokens:
                batches.append([])
            batches[-1].append(place)
        return batches

    def _translate(self, texts: Sequence[str]) -> list[tuple[str, bool]]:
        encoded = self._tokenizer([self._prefix + text for text in texts], return_tensors="pt", padding=True)
        encoded = {name: encoded[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        longest = encoded["input_ids"].shape[1]
        with self._torch.inference_mode():
            output = self._model.generate(
                **encoded,
                **self._forced,
                num_beams=self._num_beams,
                do_sample=False,
                max_new_tokens=2 * longest + 16,
            )
        end = self._model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        finished = [bool(ends & set(ids[1:])) for ids in output.tolist()]  # the first may be EOS, as NLLB's is
        decoded = self._tokenizer.batch_decode(output, skip_special_tokens=True)
        return [(" ".join(text.split()), whole) for text, whole in zip(decoded, finished, strict=True)]


def _nllb(tokenizer: Any, model: str, source_lang: str | None, target_lang: str | None) -> tuple[str, int]:
    for flag, language in (("--source_lang", source_lang), ("--target_lang", target_lang)):
        _check(language, flag, model, {token for token in _special(tokenizer) if len(token) == 8 and token[3] == "_"})
    return "", tokenizer.convert_tokens_to_ids(target_lang)


def _madlad(tokenizer: Any, model: str, source_lang: str | None, target_lang: str | None) -> tuple[str, None]:
    _check(target_lang, "--target_lang", model, _between(tokenizer, "<2", ">"))
    return f"<2{target_lang}> ", None


def _marian(tokenizer: Any, model: str, source_lang: str | None, target_lang: str | None) -> tuple[str, None]:
    if not (known := _between(tokenizer, ">>", "<<")):
        return "", None
    _check(target_lang, "--target_lang", model, known)
    return f">>{target_lang}<< ", None


_LANGUAGES = {"m2m_100": _nllb, "nllb-moe": _nllb, "t5": _madlad, "marian": _marian}


def _special(tokenizer: Any) -> set[str]:
    return {str(token) for token in tokenizer.all_special_tokens} | set(tokenizer.get_added_vocab())


def _between(tokenizer: Any, before: str, after: str) -> set[str]:
    """Languages of the tokens such as <2ru>."""
    tokens = (token for token in tokenizer.get_vocab() if token.startswith(before) and token.endswith(after))
    return {token.removeprefix(before).removesuffix(after) for token in tokens}


def _check(language: str | None, flag: str, model: str, known: set[str]) -> None:
    if not known:
        raise UserError(f"{model} has no tokens of languages: it is no translation model of a kind that is known here")
    if language not in known:
        given = f"{flag} {language}" if language else f"no {flag}"
        raise UserError(f"{given}: {model} needs one of its languages ({nearest(language or '', known)})")
