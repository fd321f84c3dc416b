"""The conversation against transformers' own generate, and what a pipe sees."""

import io
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_mistral import chat_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from vikhr_mistral import fingerprint
from vikhr_mistral.chat import Conversation, Sampling, chat, load
from vikhr_mistral.merge import merge
from vikhr_t5.errors import UserError

ROWS = 32_064  # Mistral's 32,000 pieces, and 64 rows that stand for nothing
GREEDY = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chat") / "model", ROWS, initializer_range=0.5)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(str(folder), "cpu")


def expected(loaded, messages, new_tokens: int = 12) -> str:
    """What transformers alone answers, greedily."""
    model, tokenizer = loaded
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = inputs["input_ids"]
    for _ in range(new_tokens):
        scores = model(ids).logits[0, -1, :32_000]
        ids = torch.cat([ids, scores.argmax()[None, None]], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_over_several_turns_are_those_of_transformers(loaded):
    conversation = Conversation(*loaded, GREEDY)
    messages = []
    for question in ("Кто ты?", "2 + 2?", "Мяу?"):
        written: list[str] = []
        answer = conversation.ask(question, written.append)
        messages.append({"role": "user", "content": question})
        assert "".join(written) == expected(loaded, messages)
        assert answer == "".join(written).strip()
        assert len(written) > 1
        messages.append({"role": "assistant", "content": answer})
    assert conversation.turns == messages


def test_a_pipe_gets_an_answer_a_line(folder, loaded):
    sink = io.StringIO()
    chat(str(folder), GREEDY, source=io.StringIO("Кто ты?\n\n/reset\nКто ты?\n/exit\nМяу?\n"), sink=sink)
    answer = expected(loaded, [{"role": "user", "content": "Кто ты?"}])
    assert sink.getvalue() == f"{answer}\n{answer}\n"


def test_the_system_prompt(folder, loaded):
    sink = io.StringIO()
    chat(str(folder), GREEDY, system="Ты — пёс.", source=io.StringIO("Кто ты?\n"), sink=sink)
    own = [{"role": "system", "content": "Ты — пёс."}, {"role": "user", "content": "Кто ты?"}]
    assert sink.getvalue() == f"{expected(loaded, own)}\n"
    assert sink.getvalue() != f"{expected(loaded, own[1:])}\n"


def test_draws_depend_on_the_seed(folder):
    answers = []
    for seed in (1, 1, 2):
        sink = io.StringIO()
        chat(str(folder), Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12), seed=seed,
             source=io.StringIO("Кто ты?\n"), sink=sink)  # fmt: skip
        answers.append(sink.getvalue())
    assert answers[0] == answers[1] != answers[2]


def test_rows_without_a_piece_are_never_said(loaded, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[32_000:] = 100 * model.lm_head.weight[:64]
    conversation = Conversation(model, loaded[1], GREEDY)
    assert (
        conversation.ask("Кто ты?", lambda _: None)
        == expected(loaded, [{"role": "user", "content": "Кто ты?"}]).strip()
    )


def test_a_long_conversation_forgets_its_oldest_turns_and_keeps_the_system(loaded):
    conversation = Conversation(*loaded, GREEDY, system="Ты — пёс.")
    for number in range(5):
        conversation.ask(f"Вопрос {number}: " + "да " * 50, lambda _: None)
    prompt = loaded[1].decode(
        conversation._prompt([*conversation.turns, {"role": "user", "content": "Всё?"}])["input_ids"][0]
    )
    assert "пёс" in prompt
    assert "Вопрос 4:" in prompt
    assert "Вопрос 0:" not in prompt
    with pytest.raises(UserError, match=r"the question has .* tokens, and with max_new_tokens 12 the model reads 244"):
        conversation.ask("да " * 300, lambda _: None)


def test_what_was_said_before_an_interruption_stays(loaded):
    conversation = Conversation(*loaded, GREEDY)

    def interrupt(text: str) -> None:
        if text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Кто ты?", interrupt)
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"]


def test_an_adapter_answers_as_its_merged_model(folder, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"]),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 2)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "adapter")
    fingerprint.write(tmp_path / "adapter", folder)
    merge(tmp_path / "adapter", tmp_path / "merged")
    answers = []
    for model in (folder, tmp_path / "adapter", tmp_path / "merged"):
        sink = io.StringIO()
        chat(str(model), GREEDY, source=io.StringIO("Кто ты?\n"), sink=sink)
        answers.append(sink.getvalue())
    assert answers[0] != answers[1] == answers[2]


def test_what_cannot_be_talked_to(folder, loaded, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be opened"):
        load(str(tmp_path / "empty"))
    for file in folder.iterdir():
        (tmp_path / "empty" / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "empty" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be opened \(SafetensorError") as caught:
        load(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)
    plain = AutoTokenizer.from_pretrained(folder)
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Conversation(loaded[0], plain, GREEDY)
    plain.add_tokens([f"<{n}>" for n in range(100)])
    plain.save_pretrained(tmp_path / "wide")
    loaded[0].save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="32100 pieces, and the model 32064 rows"):
        load(str(tmp_path / "wide"))
    with pytest.raises(UserError, match="--top_p 2"):
        Sampling(top_p=2)
    with pytest.raises(UserError, match="not UTF-8"):
        chat(str(folder), GREEDY, source=io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"), sink=io.StringIO())
