"""Saiga's chats for an encoder and a decoder: the history is the input, the bot's next turn the target.

    saiga_turbo           IlyaGusev/ru_turbo_saiga                messages
    saiga_sharegpt        IlyaGusev/ru_sharegpt_cleaned           messages
    saiga_oasst1          IlyaGusev/oasst1_ru_main_branch         messages
    saiga_evol_instruct   IlyaGusev/ru_turbo_alpaca_evol_instruct instruction, output
    saiga_gpt4            lksy/ru_instruct_gpt4                   instruction, input, full_output
    vikhr_saiga           all of them, at rates by size

A chat gives one example for each turn of the bot, so that every turn is learned once, as in a decoder whose loss counts
the bot's turns alone:

    inputs   <s>system\\nТы — Сайга, …</s>\\n<s>user\\nПривет!</s>\\n<s>bot
    targets  Здравствуйте! Чем помочь?

Where the sets are read from, `tasks.settings.source` says. A chat is held out by a hash of its first question.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import seqio
import tensorflow as tf

from tasks import settings
from tasks.preprocessors import to_instructions
from vikhr_t5 import text_metrics
from vikhr_t5.data.chats import PUBLISHED, SCHEMAS, SYSTEM_PROMPT, Chat, Turn, is_held_out, messages
from vikhr_t5.data.sources import Example

SUFFIX = "<s>bot"
MAX_INPUTS = 1024  # tokens with EOS, as in the recipes' TASK_FEATURE_LENGTHS


def examples(chat: Chat, length: Callable[[str], int], max_inputs: int = MAX_INPUTS) -> Iterator[tuple[str, str]]:
    """(inputs, targets) of each turn of the bot that answers something.

    A chat without a system prompt gets `SYSTEM_PROMPT`. Where the history is too long, its oldest turns go, never the
    system prompt, the last question or the suffix; an example whose last question alone is too long is left out.

    Args:
        chat: turns in order.
        length: tokens of a text, without EOS.
        max_inputs: the most tokens of the inputs, with EOS.
    """
    system = [turn for turn in chat[:1] if turn.role == "system"] or [Turn("system", SYSTEM_PROMPT)]
    turns = [turn for turn in chat if turn.role != "system"]
    for place, turn in enumerate(turns):
        history = turns[:place] if turn.role == "bot" else []
        while any(earlier.role == "user" for earlier in history):
            inputs = "".join(map(str, [*system, *history])) + SUFFIX
            if length(inputs) < max_inputs:
                yield inputs, turn.content
                break
            history = history[1:]


def next_turns(
    make: Callable[..., Chat], fields: Sequence[str], max_inputs: int = MAX_INPUTS
) -> Callable[..., tf.data.Dataset]:
    """A seqio preprocessor: rows of a set -> {inputs, targets} of their chats.

    Args:
        make: what makes a chat of a row's `fields`.
        fields: in the order of its arguments.
        max_inputs: as in `examples`.
    """

    def preprocess(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
        vocabulary = output_features["inputs"].vocabulary

        def length(text: str) -> int:
            return len(vocabulary.encode(text))

        def turns(*row: str) -> Iterator[tuple[str, str]]:
            return examples(make(*row), length, max_inputs)

        return to_instructions(dataset, turns, fields)

    preprocess.__name__ = f"next_turns_of_{make.__name__}"
    return preprocess


def add_task(
    name: str,
    dataset: str,
    make: Callable[..., Chat] = messages,
    fields: Sequence[str] = ("messages",),
    max_inputs: int = MAX_INPUTS,
) -> None:
    """Register a published set of chats.

    Args:
        name: of the task.
        dataset: its name on the hub.
        make, fields, max_inputs: as in `next_turns`.
    """

    def belongs(split: str, row: Example) -> bool:
        return is_held_out(make(*(row[field].decode() for field in fields))) == (split == "validation")

    seqio.TaskRegistry.add(
        name,
        source=settings.source(dataset, fields, belongs),
        preprocessors=[
            next_turns(make, fields, max_inputs),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=settings.output_features(),
        metric_fns=[text_metrics.chrf, text_metrics.rouge],
    )


SETS = {
    "saiga_turbo": "IlyaGusev/ru_turbo_saiga",
    "saiga_sharegpt": "IlyaGusev/ru_sharegpt_cleaned",
    "saiga_oasst1": "IlyaGusev/oasst1_ru_main_branch",
    "saiga_evol_instruct": "IlyaGusev/ru_turbo_alpaca_evol_instruct",
    "saiga_gpt4": "lksy/ru_instruct_gpt4",
}

for task, published in SETS.items():
    add_task(task, published, *SCHEMAS[PUBLISHED[published]])

seqio.MixtureRegistry.add("vikhr_saiga", list(SETS), default_rate=seqio.mixing_rate_num_examples)
