"""The playground, served for real and used as a browser uses it: tokens stream, ten users at once, hostile input. The
slow test clicks through it in headless Chromium."""

import html
import itertools
import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from tiny_mistral import chat_folder
from transformers import T5Config, T5ForConditionalGeneration

from vikhr_t5 import api, cli, playground

VOCABULARY = Path(__file__).parent / "reference" / "vocabulary" / "ru924.model"
HOSTILE = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)> **жирно** [a](javascript:alert(1))",
    "control": "нуль\x00 звонок\x07 esc\x1b[31m назад\u202eдорп\ufeff",
    "surrogates and signs": "👩‍👩‍👧 ё e\u0301 \U0010ffff ￿",
    "gin": "'); DROP TABLE users; -- %(value)s {x} {{y}}",
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral of one layer with random weights, Mistral's own tokenizer and a chat template."""
    return chat_folder(tmp_path_factory.mktemp("playground") / "chat")


@pytest.fixture(scope="module")
def t5_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face T5 of one layer with random weights, and the reference's vocabulary: 924 pieces, 100 sentinels."""
    folder = tmp_path_factory.mktemp("playground") / "t5"
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=1024, **sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    shutil.copyfile(VOCABULARY, folder / "spiece.model")
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def serve(folder: Path) -> Iterator[str]:
    app = playground.page(str(folder))
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **playground.LOOK)
    yield url
    app.close()


@pytest.fixture(scope="module")
def chat_url(chat_model: Path) -> Iterator[str]:
    yield from serve(chat_model)


@pytest.fixture(scope="module")
def t5_url(t5_model: Path) -> Iterator[str]:
    yield from serve(t5_model)


def ask(url: str, question: str, tokens: int = 8, client: Client | None = None) -> list[tuple]:
    """Everything that a browser gets, in order: (conversation as HTML, text box, count). A client has one."""
    job = (client or Client(url, verbose=False)).submit(question, tokens, 0, 0, 1, api_name="/answer")
    updates = list(job)
    job.result()  # raises what the page shows as an error
    return updates


def turn(update: tuple, number: int = -1) -> str:
    content = update[0][number]["content"]
    return html.unescape(content if isinstance(content, str) else "".join(part["text"] for part in content))


def test_an_answer_streams(chat_url: str) -> None:
    updates = ask(chat_url, "Привет!", tokens=12)
    assert len(updates) > 3
    texts = [turn(update) for update in updates]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert [turn["role"] for turn in updates[-1][0]] == ["user", "assistant"]
    assert "tokens" in updates[-1][2]


def test_ten_users_at_once(chat_url: str) -> None:
    """Each gets what one alone gets."""
    questions = [f"Вопрос номер {n}?" for n in range(10)]
    with ThreadPoolExecutor(10) as pool:
        together = [turn(updates[-1]) for updates in pool.map(lambda q: ask(chat_url, q), questions)]
    assert together[:2] == [turn(ask(chat_url, question)[-1]) for question in questions[:2]]
    assert len(together) == 10


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_text_is_text(chat_url: str, text: str) -> None:
    last = ask(chat_url, text)[-1]
    assert turn(last, 0) == playground.clean(text)
    assert not any(mark in str(last[0][0]["content"]) for mark in "<\x00\x07\x1b\u202e\ufeff")


@pytest.mark.parametrize(
    ("text", "words"),
    [("ё" * 10_000_000, "10,000,000 characters"), (" \n\x00", "write something"), ("слово " * 2000, "shorten it")],
    ids=["ten million characters", "nothing", "more than the model reads"],
)
def test_what_is_refused_is_said(chat_url: str, text: str, words: str) -> None:
    with pytest.raises(AppError, match=words):
        ask(chat_url, text)
    assert ask(chat_url, "А так?")  # and the next question is answered


def test_a_refused_question_is_no_turn(chat_url: str) -> None:
    client = Client(chat_url, verbose=False)
    ask(chat_url, "Первый?", client=client)
    with pytest.raises(AppError, match="shorten it"):
        ask(chat_url, "слово " * 2000, client=client)
    last = ask(chat_url, "Второй?", client=client)[-1]
    assert [one["role"] for one in last[0]] == ["user", "assistant"] * 2
    assert [turn(last, 0), turn(last, 2)] == ["Первый?", "Второй?"]


def test_only_this_machine_is_listened_to(chat_url: str) -> None:
    assert chat_url.startswith("http://127.0.0.1:")


def test_bad_input(tmp_path: Path, capfd: pytest.CaptureFixture[str], chat_model: Path) -> None:
    assert cli.main(["playground", str(tmp_path / "nothing")]) == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["playground", str(chat_model), "--port", str(port)]) == 2
    err = capfd.readouterr().err.strip().split("\n")[-1]
    assert f"{port}" in err
    assert "--port" in err


# ---- T5 --------------------------------------------------------------------------------------------------------------


def ask_t5(url: str, text: str, mode: str, tokens: int = 6, temperature: float = 0.0, seed: int = 0) -> list[tuple]:
    """What a browser gets, in order: (answer, tokens of the text, their count, of the answer, their count)."""
    job = Client(url, verbose=False).submit(text, mode, tokens, temperature, 0, 1, seed, api_name="/answer")
    updates = list(job)
    job.result()
    return updates


def pieces_in(highlighted: list[dict]) -> list[str]:
    return [part["token"] for part in highlighted]


@pytest.mark.parametrize("mode", playground.MODES)
def test_a_t5_answers_token_by_token(t5_url: str, t5_model: Path, mode: str) -> None:
    text = "Открыть ___ в меню."
    updates = ask_t5(t5_url, text, mode)
    assert [len(update[3]) for update in updates] == [1, 2, 3, 4, 5, 6]
    model = api.load(t5_model)
    (expected,) = model.generate([text], max_length=6, blanks=mode == playground.MODES[0])
    assert updates[-1][0] in (expected.text, expected.answers[0].filled)
    ids = model.prompt(text, blanks=mode == playground.MODES[0]).ids
    assert pieces_in(updates[-1][1]) == [model.vocabulary.piece(id).replace("▁", " ") for id in ids]
    assert updates[-1][2].startswith(f"{len(ids)} tokens")


def test_a_seed_draws_the_same_again(t5_url: str) -> None:
    drawn = [ask_t5(t5_url, "Москва", playground.MODES[1], temperature=1.5, seed=seed)[-1][0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [("слово " * 2000, "and the limit is"), ("___ " * 101, "101 blanks"), ("ё" * 60_000, "60,000 characters")],
    ids=["more than the model reads", "more blanks than sentinels", "too many characters"],
)
def test_what_a_t5_refuses_is_said(t5_url: str, text: str, words: str) -> None:
    with pytest.raises(AppError, match=words):
        ask_t5(t5_url, text, playground.MODES[0])


@pytest.fixture
def browser(tmp_path: Path):
    """Headless Chromium, which keeps a log of what it asks for."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver_path:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ("background-networking", "component-update", "sync")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1200"]
    for flag in [*flags, f"--user-data-dir={tmp_path}", *(f"--disable-{name}" for name in quiet)]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    driver.implicitly_wait(30)
    yield driver
    driver.quit()


def assert_nothing_of_another_host(browser) -> None:
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert len(sent) > 5
    assert {urlsplit(url).hostname for url in sent if url.startswith(("http", "ws"))} == {"127.0.0.1"}
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def counts_until(browser, last: str) -> list[str]:
    """The counts of tokens that the page shows one after another."""
    counts: list[str] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and counts[-1:] != [last]:
        count = browser.find_element("css selector", "#said-count").text.split(",")[0]
        if count and count not in counts:
            counts.append(count)
    return counts


@pytest.mark.slow
def test_in_a_browser(t5_url: str, browser) -> None:
    """Type, click, see tokens stream; markup is shown, not run; nothing is asked of another host."""
    browser.get(t5_url)
    text = "<img src=x onerror='document.title=1'> Открыть ___ в меню"
    browser.find_element("css selector", "#text textarea").send_keys(text)
    browser.find_element("css selector", "#go button, button#go").click()
    counts = counts_until(browser, "64 tokens")
    assert len(counts) > 1  # it grew before our eyes
    assert counts[-1] == "64 tokens"
    shown = "".join(part.text for part in browser.find_elements("css selector", ".tokens"))
    assert "<imgsrc=xonerror=" in "".join(shown.split())  # each token a word of its own
    assert "vikhr-t5" in browser.title
    assert_nothing_of_another_host(browser)


@pytest.mark.slow
def test_a_chat_in_a_browser(chat_url: str, browser) -> None:
    """A question of markup and of two lines stands in the conversation as it was written."""
    browser.get(chat_url)
    box = browser.find_element("css selector", "#text textarea")
    box.send_keys("<b>жирно</b> $$x$$ <img src=http://host.invalid/x> &lt;", "\ue008\ue007\ue000", "вторая строка")
    browser.find_element("css selector", "#go button, button#go").click()
    (question,) = browser.find_elements("css selector", "#window .user-row .message-content")
    assert question.text == "<b>жирно</b> $$x$$ <img src=http://host.invalid/x> &lt;\nвторая строка"
    browser.implicitly_wait(0)
    assert not browser.find_elements("css selector", "#window .user-row b, #window .user-row img")
    assert_nothing_of_another_host(browser)
