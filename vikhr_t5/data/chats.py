"""Saiga's chats: what is published -> turns, and a turn as Saiga's template writes it. No TensorFlow, no torch.

    IlyaGusev/ru_turbo_saiga                messages
    IlyaGusev/ru_sharegpt_cleaned           messages
    IlyaGusev/oasst1_ru_main_branch         messages
    IlyaGusev/ru_turbo_alpaca_evol_instruct instruction, output
    lksy/ru_instruct_gpt4                   instruction, input, full_output

`tasks/saiga.py` makes examples for an encoder and a decoder of them, `vikhr_mistral/chats.py` rows for a decoder.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from vikhr_t5.data.hashing import text_hash
from vikhr_t5.errors import UserError, nearest

SYSTEM_PROMPT = "Ты — Сайга, русскоязычный автоматический ассистент. Ты разговариваешь с людьми и помогаешь им."
ROLES = {"system": "system", "user": "user", "bot": "bot", "assistant": "bot"}  # as published -> as written
HELD_OUT = 0.02  # share of the chats


class Turn(NamedTuple):
    role: str
    content: str

    def __str__(self) -> str:
        return f"<s>{self.role}\n{self.content}</s>\n"


Chat = list[Turn]


def messages(record: Any) -> Chat:
    """A chat from a list of {role, content}, or {role: [...], content: [...]}, which is how older versions of
    `datasets` store the same; also as JSON. Blank turns are left out. UserError for anything else."""
    try:
        found = json.loads(record) if isinstance(record, str) else record
        if isinstance(found, dict):
            pairs = list(zip(found["role"], found["content"], strict=True))
        else:
            pairs = [(message["role"], message["content"]) for message in found]
        chat = [Turn(str(role), content.strip()) for role, content in pairs if content.strip()]
    except (ValueError, TypeError, KeyError, AttributeError):
        shown = str(record)[:80]
        raise UserError(f"a chat is a list of {{role, content}}, both texts; this is none: {shown!r}") from None
    for role, _ in chat:
        if role not in ROLES:
            raise UserError(f"unknown role {role!r} in the chat {str(record)[:80]!r}; {nearest(role, ROLES)}")
    return [Turn(ROLES[role], content) for role, content in chat]


def instruction(asked: str, answer: str) -> Chat:
    """A chat of one question."""
    return [turn for turn in (Turn("user", asked.strip()), Turn("bot", answer.strip())) if turn.content]


def instruction_with_input(asked: str, given: str, answer: str) -> Chat:
    """A chat of one question, to which the text that it is about belongs."""
    return instruction(f"{asked.strip()}\nДано: {given.strip()}" if given.strip() else asked, answer)


class Schema(NamedTuple):
    """make: gives the chat of a row's `fields`, in the order of its arguments."""

    make: Callable[..., Chat]
    fields: tuple[str, ...]


# The first schema whose fields a row has is the row's.
SCHEMAS = {
    "messages": Schema(messages, ("messages",)),
    "gpt4": Schema(instruction_with_input, ("instruction", "input", "full_output")),
    "alpaca": Schema(instruction_with_input, ("instruction", "input", "output")),
    "evol_instruct": Schema(instruction, ("instruction", "output")),
}
PUBLISHED = {
    "IlyaGusev/ru_turbo_saiga": "messages",
    "IlyaGusev/ru_sharegpt_cleaned": "messages",
    "IlyaGusev/oasst1_ru_main_branch": "messages",
    "IlyaGusev/ru_turbo_alpaca_evol_instruct": "evol_instruct",
    "lksy/ru_instruct_gpt4": "gpt4",
}


def is_held_out(chat: Chat, share: float = HELD_OUT) -> bool:
    """Whether a chat belongs to the validation split: by a hash of its first question, so that equal questions fall on
    the same side."""
    asked = next((turn.content for turn in chat if turn.role == "user"), "")
    return text_hash(asked.encode()) < share
