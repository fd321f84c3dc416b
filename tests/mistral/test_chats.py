"""Saiga's template and the bot's mask: against SentencePiece, turn by turn, and against text written by hand."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vikhr_mistral import chats, pieces, tokenizer_files
from vikhr_t5.data.chats import SYSTEM_PROMPT, Turn, is_held_out
from vikhr_t5.errors import UserError

CHAT = [
    Turn("system", "Ты — кот."),
    Turn("user", "Кто ты?\n\nОтветь  коротко 🙂"),
    Turn("bot", "🐈 Я — кот.\nМяу!"),
    Turn("user", "2 + 2?"),
    Turn("bot", " 4"),
    Turn("user", "Спасибо"),
    Turn("bot", "Ёжик\tи ♥"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Mistral-7B-v0.1's tokenizer."""
    folder = tmp_path_factory.mktemp("mistral")
    tokenizer_files.write(pieces.open_model("mistral"), folder)
    return folder


@pytest.fixture
def tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats.set_chat_template(tokenizer)
    return tokenizer


def messages(chat):
    return [{"role": turn.role, "content": turn.content} for turn in chat]


def reference(chat) -> tuple[list[int], list[bool]]:
    """Ids and mask of a chat by SentencePiece alone: what stands between <s> and </s> is encoded by itself."""
    model = pieces.processor(pieces.open_model("mistral"))
    ids: list[int] = []
    mask: list[bool] = []
    for turn in chat:
        header = model.encode(f"{turn.role}\n")
        both = model.encode(f"{turn.role}\n{turn.content.strip()}")
        assert both[: len(header)] == header
        after = model.encode("\n")
        ids += [1, *both, 2, *after]
        counts = turn.role == "bot"
        mask += [False] * (1 + len(header)) + [counts] * (len(both) - len(header) + 1) + [False] * len(after)
    return ids, mask


def test_the_template_is_saigas(tokenizer):
    text = tokenizer.apply_chat_template(messages(CHAT), tokenize=False)
    assert text == "".join(str(Turn(role, content.strip())) for role, content in CHAT)
    prompt = tokenizer.apply_chat_template(messages(CHAT[:2]), tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>system\nТы — кот.</s>\n<s>user\nКто ты?\n\nОтветь  коротко 🙂</s>\n<s>bot\n"


def test_ids_and_mask_are_sentencepieces_token_for_token(tokenizer):
    ids, mask = reference(CHAT)
    example = chats.encode(tokenizer, CHAT)
    assert example["input_ids"].tolist() == ids
    assert tokenizer.apply_chat_template(messages(CHAT), return_dict=False) == ids
    assert example["labels"].tolist() == [token if counts else -100 for token, counts in zip(ids, mask, strict=True)]
    learned = [token for token in example["labels"].tolist() if token != -100]
    assert learned.count(tokenizer.eos_token_id) == 3
    assert tokenizer.decode(learned) == "🐈 Я — кот.\nМяу!</s>4</s>Ёжик\tи ♥</s>"


def test_what_is_learned_is_what_a_prompt_is_continued_by(tokenizer):
    for end in (2, 4, 6):
        prompt = tokenizer.apply_chat_template(messages(CHAT[:end]), add_generation_prompt=True, return_dict=False)
        whole = chats.encode(tokenizer, CHAT[: end + 1])
        assert whole["input_ids"][: len(prompt)].tolist() == prompt
        assert whole["labels"][len(prompt)] == whole["input_ids"][len(prompt)]
        assert whole["labels"][len(prompt) - 1] == chats.IGNORED


def test_a_system_prompt_by_default_and_the_other_name_of_the_bot(tokenizer):
    asked = [{"role": "user", "content": " Привет "}, {"role": "assistant", "content": "Здравствуйте!"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False)
    assert text == f"<s>system\n{SYSTEM_PROMPT}</s>\n<s>user\nПривет</s>\n<s>bot\nЗдравствуйте!</s>\n"
    chats.set_chat_template(tokenizer, 'Скажи "да" \\ нет\n{{ 1 }}')
    text = tokenizer.apply_chat_template(asked, tokenize=False)
    assert text.startswith('<s>system\nСкажи "да" \\ нет\n{{ 1 }}</s>\n<s>user\n')
    chats.set_chat_template(tokenizer, "")
    assert tokenizer.apply_chat_template(asked, tokenize=False).startswith("<s>user\n")
    with pytest.raises(Exception, match="unknown role narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=False)


def test_the_template_is_saved_with_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.apply_chat_template(messages(CHAT)) == tokenizer.apply_chat_template(messages(CHAT))


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and pieces that join the line break after the header with the first letter, and the last two."""
    characters = sorted(set("system\nuserbotДану.✓"))
    names = ["<unk>", "<s>", "</s>", *characters, "\nД", "\nДа", "у."]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE(vocabulary, [("\n", "Д"), ("\nД", "а"), ("у", ".")], unk_token="<unk>")
    raw = Tokenizer(model)
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_piece_that_joins_header_and_answer_counts():
    tokenizer = joining_tokenizer()
    chats.set_chat_template(tokenizer, "")
    example = chats.encode(tokenizer, [Turn("user", "Дану."), Turn("bot", "Дану."), Turn("bot", "ану.")])
    found = [
        (tokenizer.convert_ids_to_tokens(int(token)), label != chats.IGNORED)
        for token, label in zip(example["input_ids"], example["labels"], strict=True)
    ]
    asked = [("<s>", False), *((c, False) for c in "user"), ("\nДа", False), ("н", False), ("у.", False)]
    answer = [("<s>", False), *((c, False) for c in "bot"), ("\nДа", True), ("н", True), ("у.", True), ("</s>", True)]
    more = [("<s>", False), *((c, False) for c in "bot\n"), ("а", True), ("н", True), ("у.", True), ("</s>", True)]
    line = [("\n", False)]
    assert found == [*asked, ("</s>", False), *line, *answer, *line, *more, *line]


def test_tokenizers_without_turns_are_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no bos_token or eos_token"):
        chats.set_chat_template(tokenizer)


# ---- rows of published sets -----------------------------------------------------------------------------------------


def published(folder: Path) -> list[str]:
    """A file for each published schema, in the forms they come in."""
    rows = {
        "turbo.jsonl": [{"messages": messages(CHAT), "seed": "кот"}],
        "oasst1.jsonl": [{"messages": {"role": ["user", "bot"], "content": ["Да?", "Да."]}, "id": "1"}],
        "evol.jsonl": [{"instruction": "Назови кота.", "output": "Барсик", "iteration": 1}],
        "alpaca.jsonl": [{"instruction": "Удвой.", "input": "2", "output": "4"}],
    }
    for name, content in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / name).write_text(text, encoding="utf-8")
    gpt4 = [{"instruction": "Утрой.", "input": "3", "output": "коротко", "full_output": "9"}]
    pq.write_table(pa.Table.from_pylist(gpt4), folder / "gpt4.parquet")
    return [str(folder / name) for name in (*rows, "gpt4.parquet")]


def test_every_published_schema_is_read(tmp_path):
    found = [chat for _, chat in chats.read_chats(published(tmp_path))]
    assert found == [
        [Turn(role, content.strip()) for role, content in CHAT],
        [Turn("user", "Да?"), Turn("bot", "Да.")],
        [Turn("user", "Назови кота."), Turn("bot", "Барсик")],
        [Turn("user", "Удвой.\nДано: 2"), Turn("bot", "4")],
        [Turn("user", "Утрой.\nДано: 3"), Turn("bot", "9")],
    ]


def write(folder: Path, rows: list[object]) -> str:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(asked: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "bot", "content": answer}]}


def test_a_split_by_the_first_question(tokenizer, tmp_path):
    rows = [pair(f"Вопрос {n}?", f"Ответ {n}.") for n in range(200)]
    loaded = chats.load(tokenizer, [write(tmp_path, rows)], 256, held_out=0.1)
    held_out = [is_held_out([Turn("user", f"Вопрос {n}?")], 0.1) for n in range(200)]
    assert (len(loaded.train), len(loaded.validation)) == (200 - sum(held_out), sum(held_out))
    assert 5 < sum(held_out) < 40
    assert loaded.counts == Counter(read=200)
    expected = chats.encode(tokenizer, [Turn("user", "Вопрос 0?"), Turn("bot", "Ответ 0.")])
    first = (loaded.validation if held_out[0] else loaded.train)[0]
    assert all(np.array_equal(first[name], expected[name]) for name in expected)


def test_long_chats_are_cut_at_turns_and_counted(tokenizer, tmp_path):
    long = {
        "messages": messages(
            [Turn("user", "Раз?"), Turn("bot", "Два."), Turn("user", "Три?"), Turn("bot", "ой " * 300)]
        )
    }
    open_end = {"messages": messages([*CHAT[:3], Turn("user", "Ты здесь?")])}
    rows = [long, pair("Всё?", "да " * 400), open_end, pair("Тег?", "Пишите </s> в конце."), pair("Кто?", "Я.")]
    loaded = chats.load(tokenizer, [write(tmp_path, rows)], 256, held_out=0.0)
    assert dict(loaded.counts) == {"read": 5, "cut": 1, "too long": 1, "special token in the text": 1}
    texts = [tokenizer.decode(example["input_ids"]) for example in loaded.train]
    assert len(texts) == 3
    assert texts[0].endswith("Два.</s> \n")
    assert "Ты здесь" not in texts[1]
    assert all(len(example["input_ids"]) <= 256 for example in loaded.train)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"messages": [{"role": "usr", "content": "Да?"}, {"role": "bot", "content": "Да."}]},
            "unknown role 'usr'.*user",
        ),
        ({"messages": [{"role": "user", "content": "Да?"}]}, "no turn of the bot"),
        ({"messages": [{"role": "user", "content": "Да?"}, {"role": "bot", "content": " "}]}, "no turn of the bot"),
        ({"messages": [{"role": "user"}]}, "a chat is a list of"),
        ({"messages": "Привет"}, "a chat is a list of"),
        ({"messages": None}, "a chat is a list of"),
        ({"instruction": 3, "output": "да"}, "must be texts"),
        ({"question": "да?"}, "the row has the fields question; a chat has: messages"),
    ],
)
def test_a_malformed_row_is_an_error_by_file_and_row_or_counted(tokenizer, tmp_path, row, says):
    path = write(tmp_path, [pair("Кто?", "Я."), row])
    with pytest.raises(UserError, match=f"chats.jsonl:2: .*{says}.*skip_bad_chats") as caught:
        chats.load(tokenizer, [path], 256)
    assert "\n" not in str(caught.value)
    loaded = chats.load(tokenizer, [path], 256, held_out=0.0, skip_bad_chats=True)
    assert (len(loaded.train), loaded.counts["malformed"]) == (1, 1)


def test_nothing_left_is_an_error(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no chat is left to train on \(1 read, 1 too long\)"):
        chats.load(tokenizer, [write(tmp_path, [pair("Всё?", "да " * 400)])], 256, held_out=0.0)
    with pytest.raises(UserError, match="no such file or folder"):
        chats.load(tokenizer, [str(tmp_path / "absent.jsonl")], 256)
