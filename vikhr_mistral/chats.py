"""Saiga's chats as tokens: the chat template, and the mask by which the loss counts the bot's turns alone.

A chat, as `tokenizer.apply_chat_template` renders it once `set_chat_template` was called:

    <s>system\\nТы — Сайга, …</s>\\n<s>user\\nПривет!</s>\\n<s>bot\\nЗдравствуйте!</s>\\n

`<s>bot\\n` is the prompt of a generation. The loss counts the bot's text and the `</s>` that ends it, nothing else: not
the header `<s>bot\\n`, which the prompt gives, nor the `\\n` after `</s>`, which nobody generates. A token counts if at
least one of its characters is the bot's: where a piece of the vocabulary joins the header's line break with the
text, that token counts. (In Mistral's vocabulary no piece holds a line break, so none is joined there.) The mask is
transformers' own (`{% generation %}` in the template, `return_assistant_tokens_mask`), which trl reads as well.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vikhr_mistral.packing import IGNORED
from vikhr_t5.data.chats import HELD_OUT, SCHEMAS, SYSTEM_PROMPT, Chat, is_held_out
from vikhr_t5.data.records import read_rows
from vikhr_t5.errors import UserError
from vikhr_t5.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Example = dict[str, np.ndarray]  # "input_ids" and "labels", int32 [T]; a label is the token itself, or IGNORED


class Chats(NamedTuple):
    """counts: chats "read", "cut" (their last turns were left out), and each reason for which some were left out."""

    train: list[Example]
    validation: list[Example]
    counts: Counter[str]


def chat_template(system_prompt: str = SYSTEM_PROMPT) -> str:
    """Saiga's template in Jinja. A chat that does not begin with a system turn gets `system_prompt` (none if empty);
    "assistant" is another name of "bot"; contents are stripped; another role is an error of the template."""
    quoted = json.dumps(system_prompt, ensure_ascii=False)
    default = [
        "{% if messages[0]['role'] != 'system' %}",
        f"{{{{ bos_token + 'system\\n' + {quoted} + eos_token + '\\n' }}}}",
        "{% endif %}",
    ]
    return "".join(
        [
            *(default if system_prompt else []),
            "{% for message in messages %}",
            "{% set role = 'bot' if message['role'] == 'assistant' else message['role'] %}",
            "{% if role not in ['system', 'user', 'bot'] %}",
            "{{ raise_exception('unknown role ' + role + ': system, user and bot are known') }}",
            "{% endif %}",
            "{{ bos_token + role + '\\n' }}",
            "{% set text = message['content'] | trim + eos_token %}",
            "{% if role == 'bot' %}{% generation %}{{ text }}{% endgeneration %}{% else %}{{ text }}{% endif %}",
            "{{ '\\n' }}",
            "{% endfor %}",
            "{% if add_generation_prompt %}{{ bos_token + 'bot\\n' }}{% endif %}",
        ]
    )


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", system_prompt: str = SYSTEM_PROMPT) -> None:
    """Give a tokenizer Saiga's template; it is saved with the tokenizer.

    Raises:
        UserError: the tokenizer has no <s> or </s>, or does not find them in a text.
    """
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    if not begin or not end:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer names no bos_token or eos_token; chats need both")
    ids = tokenizer.encode(f"{begin}bot{end}", add_special_tokens=False)
    if ids[:1] != [tokenizer.bos_token_id] or ids[-1:] != [tokenizer.eos_token_id]:
        raise UserError(
            f"{tokenizer.name_or_path}: {begin} and {end} are not one token each in a text; chats need that"
        )
    tokenizer.chat_template = chat_template(system_prompt)


def encode(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> Example:
    """A chat in tokens, with the loss on the bot's turns."""
    encoded: Any = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in chat],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = np.array(encoded["input_ids"], np.int32)
    labels = np.where(np.array(encoded["assistant_masks"], bool), ids, IGNORED)
    return {"input_ids": ids, "labels": labels.astype(np.int32)}


def encode_within(tokenizer: "PreTrainedTokenizerBase", chat: Chat, max_length: int) -> tuple[Example | None, bool]:
    """The longest beginning of a chat, in whole turns and up to one of the bot, that has at most `max_length` tokens;
    None where even the first answer is beyond. And whether answers were cut off."""
    ends = [place + 1 for place, turn in enumerate(chat) if turn.role == "bot"]
    for end in reversed(ends):
        example = encode(tokenizer, chat[:end])
        if len(example["input_ids"]) <= max_length:
            return example, end < ends[-1]
    return None, True


def read_chats(sources: Sequence[str]) -> Iterator[tuple[str, Chat | UserError]]:
    """(where, chat) of all rows of the sources; in place of a chat, what is wrong with the row.

    Args:
        sources: as in `records.read_rows`: files, folders or names on the hub, with the fields of one of SCHEMAS.
    """
    for source in sources:
        for where, row in read_rows(source):
            try:
                yield where, _chat_of(row)
            except UserError as error:
                yield where, UserError(f"{where}: {error}")


def _chat_of(row: Mapping[str, Any]) -> Chat:
    for schema in SCHEMAS.values():
        if all(field in row for field in schema.fields):
            try:
                chat = schema.make(*(row[field] for field in schema.fields))
            except AttributeError:
                raise UserError(f"{', '.join(schema.fields)} must be texts") from None
            if not any(turn.role == "bot" for turn in chat):
                raise UserError("no turn of the bot, so there is nothing to learn")
            return chat
    known = " | ".join(", ".join(schema.fields) for schema in SCHEMAS.values())
    raise UserError(f"the row has the fields {', '.join(row) or '(none)'}; a chat has: {known}")


def load(
    tokenizer: "PreTrainedTokenizerBase",
    sources: Sequence[str],
    max_length: int,
    held_out: float = HELD_OUT,
    skip_bad_chats: bool = False,
) -> Chats:
    """All chats in tokens, split by a hash of their first questions.

    A chat whose text holds a special token (`</s>`) is left out and counted: it would end in the midst of a turn. So
    is one whose first answer lies behind `max_length` tokens.

    Args:
        tokenizer: with Saiga's template (`set_chat_template`).
        sources: as in `read_chats`.
        max_length: tokens of an example.
        held_out: share of the validation split.
        skip_bad_chats: leave malformed rows out and count them; without it the first one is an error.

    Raises:
        UserError: a malformed row, by file and row; or no chat at all is left for training.
    """
    chats = Chats([], [], Counter())
    special = [str(token) for token in tokenizer.all_special_tokens]
    with Progress("chats", None, "chats") as progress:
        for _, chat in read_chats(sources):
            progress.advance()
            chats.counts["read"] += 1
            if isinstance(chat, UserError):
                if not skip_bad_chats:
                    raise UserError(f"{chat}; mend it, or set skip_bad_chats: true")
                chats.counts["malformed"] += 1
            elif any(token in turn.content for turn in chat for token in special):
                chats.counts["special token in the text"] += 1
            else:
                example, cut = encode_within(tokenizer, chat, max_length)
                chats.counts["cut" if example else "too long"] += cut
                if example:
                    (chats.validation if is_held_out(chat, held_out) else chats.train).append(example)
    if not chats.train:
        raise UserError(f"{', '.join(sources)}: no chat is left to train on ({describe(chats.counts)})")
    return chats


def describe(counts: Mapping[str, int]) -> str:
    """`10,000 read, 12 cut, 3 too long`."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "read") or "none read"
