"""Saiga's chats from local files of the published schemas, which the tests write; nothing is downloaded."""

import json
from pathlib import Path

import published
import pyarrow as pa
import pytest
import seqio

from vikhr_t5.data.cache import cache
from vikhr_t5.errors import UserError

CHATS = {
    "saiga_turbo": "IlyaGusev/ru_turbo_saiga",
    "saiga_sharegpt": "IlyaGusev/ru_sharegpt_cleaned",
    "saiga_oasst1": "IlyaGusev/oasst1_ru_main_branch",
}
EVOL, GPT4 = "IlyaGusev/ru_turbo_alpaca_evol_instruct", "lksy/ru_instruct_gpt4"
COUNT = 24  # chats of two turns of the bot each


def chat(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Сколько будет {number} + 1?"},
        {"role": "bot", "content": f"Будет {number + 1}."},
        {"role": "user", "content": "А если прибавить ещё?"},
        {"role": "bot", "content": f"Тогда {number + 2}."},
    ]


def write(folder: Path, rows: list[dict[str, object]], form: str) -> None:
    published.write(folder, pa.Table.from_pylist(rows), form)


def pairs(task: str, *splits: str) -> list[tuple[str, str]]:
    """(inputs, targets) as text."""
    provider = seqio.TaskRegistry.get(task)
    found = [
        example
        for split in splits or ("train", "validation")
        for example in provider.get_dataset(None, split, shuffle=False).as_numpy_iterator()
    ]
    return [(e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode()) for e in found]


def question(inputs: str) -> str:
    """The first one."""
    return inputs.split("<s>user\n")[1].split("</s>")[0]


def count(text: str) -> int:
    """A length for tests: its words."""
    return len(text.split())


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("layout", ["list of messages", "lists of roles and contents"])
def test_every_turn_of_the_bot_is_one_example(data, saiga, form, layout):
    chats = [chat(number) for number in range(COUNT)]
    if layout == "list of messages":
        rows = [{"messages": messages, "seed": "арифметика"} for messages in chats]
    else:
        flat = [{key: [message[key] for message in messages] for key in ("role", "content")} for messages in chats]
        rows = [{"messages": messages, "seed": "арифметика"} for messages in flat]
    write(data / CHATS["saiga_turbo"], rows, form)
    found = pairs("saiga_turbo")
    head = f"<s>system\n{saiga.SYSTEM_PROMPT}</s>\n"
    expected = []
    for n in range(COUNT):
        asked = f"{head}<s>user\nСколько будет {n} + 1?</s>\n<s>bot"
        expected.append((asked, f"Будет {n + 1}."))
        more = f"\nБудет {n + 1}.</s>\n<s>user\nА если прибавить ещё?</s>\n<s>bot"
        expected.append((asked + more, f"Тогда {n + 2}."))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("task", CHATS)
def test_examples_are_tokens_that_end_in_eos(data, task):
    write(data / CHATS[task], [{"messages": chat(number), "id": str(number)} for number in range(COUNT)], "jsonl")
    found = seqio.TaskRegistry.get(task)
    vocabulary = found.output_features["inputs"].vocabulary
    examples = list(found.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    assert examples
    for example in examples:
        for side in ("inputs", "targets"):
            assert example[side].tolist() == [*vocabulary.encode(example[f"{side}_pretokenized"].decode()), 1]


def test_instructions_are_chats_of_one_question(data, saiga):
    evol = [{"instruction": f"Назови число {n}.", "output": f"Число {n}.", "iteration": 1} for n in range(COUNT)]
    write(data / EVOL, evol, "parquet")
    head = f"<s>system\n{saiga.SYSTEM_PROMPT}</s>\n<s>user\n"
    assert sorted(pairs("saiga_evol_instruct")) == sorted(
        (f"{head}Назови число {n}.</s>\n<s>bot", f"Число {n}.") for n in range(COUNT)
    )
    gpt4 = [
        {"instruction": f"Удвой {n}.", "input": "" if n % 2 else "целые", "output": "", "full_output": f"{2 * n}"}
        for n in range(COUNT)
    ]
    write(data / GPT4, gpt4, "saved")
    given = ["\nДано: целые", ""]
    assert sorted(pairs("saiga_gpt4")) == sorted(
        (f"{head}Удвой {n}.{given[n % 2]}</s>\n<s>bot", f"{2 * n}") for n in range(COUNT)
    )


def test_a_chat_keeps_its_own_system_prompt(saiga):
    [(inputs, targets)] = saiga.examples(
        saiga.messages('[{"role":"system","content":"Ты — кот."},{"role":"user","content":"Кто ты?"},'
                       '{"role":"assistant","content":"Мяу."}]'),
        count,
    )  # fmt: skip
    assert (inputs, targets) == ("<s>system\nТы — кот.</s>\n<s>user\nКто ты?</s>\n<s>bot", "Мяу.")


def test_a_bot_that_answers_nothing_is_no_example(saiga):
    turns = [saiga.Turn("bot", "Привет! Я Сайга."), saiga.Turn("user", "Привет!"), saiga.Turn("bot", "Чем помочь?")]
    [(inputs, targets)] = saiga.examples(turns, count)
    assert "Привет! Я Сайга." in inputs
    assert targets == "Чем помочь?"
    assert not list(saiga.examples(turns[:2], count))
    assert not list(saiga.examples([], count))
    assert saiga.messages('[{"role":"user","content":" "}]') == []


def test_a_long_history_loses_its_oldest_turns_and_never_the_question(saiga):
    turns = [saiga.Turn(("user", "bot")[n % 2], f"слово{n} " * 9 + "конец") for n in range(8)]
    made = list(saiga.examples(turns, count, max_inputs=60))
    assert len(made) == 4
    for number, (inputs, _) in enumerate(made):
        assert count(inputs) < 60
        assert inputs.startswith(f"<s>system\n{saiga.SYSTEM_PROMPT}</s>\n")
        assert f"слово{2 * number}" in inputs
        assert inputs.endswith("<s>bot")
    assert "слово0" not in made[3][0]
    assert not list(saiga.examples([saiga.Turn("user", "слово " * 99), saiga.Turn("bot", "да")], count, max_inputs=60))


def test_the_split_depends_on_the_first_question_alone(data):
    rows = [{"messages": chat(number)} for number in range(500)]
    write(data / CHATS["saiga_turbo"], rows, "parquet")
    held_out = pairs("saiga_turbo", "validation")
    questions = {question(inputs) for inputs, _ in held_out}
    assert len(held_out) == 2 * len(questions)
    assert 0.008 < len(questions) / 500 < 0.035
    assert not questions & {question(inputs) for inputs, _ in pairs("saiga_turbo", "train")}
    answered = [{"messages": [*row["messages"], {"role": "bot", "content": "Ещё."}]} for row in rows[::-1]]
    write(data / CHATS["saiga_oasst1"], answered, "jsonl")
    assert {question(inputs) for inputs, _ in pairs("saiga_oasst1", "validation")} == questions


def test_a_mixture_of_all_sets_is_cached_with_a_rate_for_every_turn(data):
    for name in CHATS.values():
        write(data / name, [{"messages": chat(number)} for number in range(150)], "parquet")
    write(data / EVOL, [{"instruction": f"Назови {n}.", "output": f"{n}"} for n in range(150)], "parquet")
    gpt4 = [{"instruction": f"Удвой {n}.", "input": "", "full_output": f"{2 * n}"} for n in range(150)]
    write(data / GPT4, gpt4, "jsonl")
    manifests = cache("vikhr_saiga", "tasks.saiga", data / "cache")
    sizes = {task: sum(one.num_examples for one in splits.values()) for task, splits in manifests.items()}
    assert sizes == {**dict.fromkeys(CHATS, 300), "saiga_evol_instruct": 150, "saiga_gpt4": 150}
    [written] = [json.loads(file.read_text()) for file in (data / "cache").rglob("*vikhr_saiga*.json")]
    assert written["rates"] == {task: splits["train"].num_examples for task, splits in manifests.items()}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "usr", "content": "Привет"}], "unknown role 'usr' .*nearest: user"),
        ([{"role": "user", "content": None}], "a chat is a list of"),
        ([{"role": "user", "text": "Привет"}], "a chat is a list of"),
        ({"role": ["user", "bot"], "content": ["Привет"]}, "a chat is a list of"),
        ("Привет", "a chat is a list of"),
    ],
)
def test_what_is_no_chat_is_shown_in_one_line(data, messages, says):
    write(data / CHATS["saiga_turbo"], [{"messages": messages}], "jsonl")
    with pytest.raises(UserError, match=says) as raised:
        cache("saiga_turbo", "tasks.saiga", data / "cache")
    assert "\n" not in str(raised.value)


def test_a_missing_set_says_what_is_missing_and_what_to_set(data):
    with pytest.raises(
        UserError, match=r"no lksy/ru_instruct_gpt4 in .*unset VIKHR_T5_DATA_DIR to read it from the hub"
    ):
        seqio.TaskRegistry.get("saiga_gpt4").source.list_shards("train")
