"""A local page on which a model can be tried: `vikhr-t5 playground MODEL_DIR`.

A T5 of any format that `api.load` reads fills blanks, continues a text or answers an instruction; a causal model
with a chat template talks. Whatever comes from the browser is text: control characters are dropped, markup is shown as
it is written, and what is longer than `MAX_CHARACTERS` is refused before a model sees it.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported: nothing is sent anywhere

import gradio as gr

from vikhr_t5 import api
from vikhr_t5.errors import UserError
from vikhr_t5.page import escape
from vikhr_t5.playground_chat import Chat
from vikhr_t5.playground_t5 import MODES, Playground

MAX_CHARACTERS = 50_000
USERS_AT_ONCE = 4  # answers that are computed at the same time; others wait in a queue that says so
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_COLORS = {str(i): color for i, color in enumerate(("#8ecae6", "#ffb703", "#a7c957", "#e5989b", "#cdb4db", "#90e0ef"))}
_SPECIAL = "special"
_CSS = "footer { display: none !important; } .tokens .textspan { padding: 1px 0; margin: 0; border-radius: 3px; }"
# How gradio serves a page of ours: without the fonts that it would fetch from another host, without uploads.
LOOK: dict[str, Any] = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": _CSS,
    "footer_links": [],
    "share": False,
    "show_error": True,
    "max_file_size": 0,
}
_EXAMPLES = [
    ["Москва — ___ России, а Париж — столица ___.", MODES[0]],
    ["Чтобы открыть документ, выберите", MODES[1]],
    ["Переведи на английский: Откройте документ.", MODES[2]],
]


def launch(folder: str, host: str = "127.0.0.1", port: int = 7860, device: str | None = None) -> None:
    """Serves the page until interrupted.

    Args:
        folder: a model's: a run, a checkpoint, or a folder of Hugging Face.
        host: the address to listen on. The default is reached from this machine alone.
        port: of the page.
        device: of a causal model, "cpu" or "cuda"; a T5 is where JAX is.

    Raises:
        UserError: no model is there, or the port is taken.
    """
    app = page(folder, device)
    try:
        app.launch(server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, **LOOK)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}): choose another --port") from None
    print(f"{folder}: http://{host}:{port} (Ctrl-C ends it)", flush=True)
    app.block_thread()


def page(folder: str, device: str | None = None) -> gr.Blocks:
    """The page of a model, which is loaded here. UserError where there is none."""
    path = Path(folder).expanduser()
    if _is_causal(path):
        return _chat_page(Chat(str(path), device), path.name)
    return _t5_page(Playground(api.load(folder)), path.name)


def _is_causal(path: Path) -> bool:
    """Whether a folder holds a causal model of Hugging Face, or an adapter of one."""
    if (path / "adapter_config.json").is_file():
        return True
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and not config.get("is_encoder_decoder", False)


def clean(text: str) -> str:
    """Text without control characters and marks that turn its direction.

    Raises:
        UserError: it is longer than `MAX_CHARACTERS`, or blank.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{len(text):,} characters; this page takes {MAX_CHARACTERS:,}")
    cleaned = _CONTROL.sub("", text.replace("\r\n", "\n"))
    if not cleaned.strip():
        raise UserError("nothing to answer: write something first")
    return cleaned


def _explained(answer: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The generator, with a UserError shown on the page."""

    def explained(*arguments: Any) -> Iterator[Any]:
        try:
            yield from answer(*arguments)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return explained


def _sampling(most_tokens: int, tokens: int, temperature: float, top_k: int, top_p: float) -> list[gr.Slider]:
    """Length of an answer, temperature, top k and top p, as a model's `answer` takes them."""
    return [
        gr.Slider(1, most_tokens, value=tokens, step=1, label="Most tokens"),
        gr.Slider(0, 2, value=temperature, step=0.05, label="Temperature", info="0: the likeliest token"),
        gr.Slider(0, 200, value=top_k, step=1, label="Top k", info="0: all"),
        gr.Slider(0.05, 1, value=top_p, step=0.05, label="Top p"),
    ]


def _on_asking(go: gr.Button, text: gr.Textbox, answer: Callable[..., Any], inputs: list, outputs: list) -> list[Any]:
    """The events of the button and of Enter."""
    triggers = (go.click, "answer"), (text.submit, None)
    return [trigger(answer, inputs, outputs, api_name=name) for trigger, name in triggers]


# ---- T5 --------------------------------------------------------------------------------------------------------------


def colored(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, str | None]]:
    """Pieces (text, is special) as gradio highlights them: neighbours in different colours."""
    return [(piece, _SPECIAL if special else str(i % len(_COLORS))) for i, (piece, special) in enumerate(pieces)]


def counted(pieces: Sequence[tuple[str, bool]]) -> str:
    """Their number, and how many a word takes."""
    words = len("".join(piece for piece, special in pieces if not special).split())
    return f"{len(pieces)} token{'s'[: len(pieces) != 1]}" + (f", {len(pieces) / words:.2f} a word" if words else "")


def _t5_page(model: Playground, name: str) -> gr.Blocks:
    @_explained
    def answer(text: str, mode: str, *settings: Any) -> Iterator[tuple[Any, ...]]:
        text = clean(text)
        asked = model.tokens(text, mode)
        head = colored(asked), counted(asked)
        for said in model.answer(text, mode, *settings):
            yield (said.text, *head, colored(said.tokens), counted(said.tokens))

    with gr.Blocks(title=f"{name} · vikhr-t5") as app:
        gr.Markdown(f"## {_plain(name)}\n{_plain(model.summary)}")
        with gr.Row():
            with gr.Column(scale=3):
                text = gr.Textbox(
                    label="Text", lines=6, max_lines=20, placeholder="Москва — ___ России.", elem_id="text"
                )
                mode = gr.Radio(list(MODES), value=MODES[0], label="What to do with it", elem_id="mode")
                with gr.Row():
                    go = gr.Button("Answer", variant="primary", elem_id="go")
                    stop = gr.Button("Stop", elem_id="stop")
                gr.Examples(_EXAMPLES, [text, mode])
            with gr.Column(scale=1), gr.Accordion("Sampling", open=True):
                sampling = _sampling(most_tokens=512, tokens=64, temperature=0, top_k=0, top_p=1)
                seed = gr.Number(value=0, precision=0, label="Seed")
        output = gr.Textbox(
            label="Answer", lines=4, max_lines=20, interactive=False, buttons=["copy"], elem_id="answer"
        )
        asked_count = gr.Markdown(elem_id="asked-count")
        asked = _token_view("Tokens of the text")
        said_count = gr.Markdown(elem_id="said-count")
        said = _token_view("Tokens of the answer")
        outputs = [output, asked, asked_count, said, said_count]
        events = _on_asking(go, text, answer, [text, mode, *sampling, seed], outputs)
        stop.click(None, cancels=events)
    return app.queue(default_concurrency_limit=USERS_AT_ONCE, max_size=100)


def _token_view(label: str) -> gr.HighlightedText:
    return gr.HighlightedText(
        label=label,
        color_map={**_COLORS, _SPECIAL: "#f07167"},
        show_legend=False,
        show_inline_category=False,
        elem_classes=["tokens"],
    )


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~-])", r"\\\1", text)


# ---- chat ------------------------------------------------------------------------------------------------------------


def _chat_page(chat: Chat, name: str) -> gr.Blocks:
    @_explained
    def answer(question: str, turns: list[dict[str, str]], *settings: Any) -> Iterator[tuple[Any, ...]]:
        question = clean(question)
        for said in chat.answer(turns, question, *settings):  # the first comes when the question is not refused
            now = [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": said}]
            yield now, [turn | {"content": escape(turn["content"])} for turn in now], "", counted(chat.tokens(said))

    with gr.Blocks(title=f"{name} · vikhr-t5", fill_height=True) as app:
        gr.Markdown(f"## {_plain(name)}\n{_plain(chat.summary)}")
        turns = gr.State([])
        # It shows HTML, so turns are kept apart from what is shown; its buttons would share or copy that.
        window = gr.Chatbot(
            label="Conversation", render_markdown=False, latex_delimiters=[], buttons=[], height=480, elem_id="window"
        )
        count = gr.Markdown(elem_id="said-count")
        text = gr.Textbox(label="Question", placeholder="Почему небо голубое?", elem_id="text")
        with gr.Row():
            go = gr.Button("Ask", variant="primary", elem_id="go")
            stop = gr.Button("Stop", elem_id="stop")
            forget = gr.Button("Forget the conversation", elem_id="forget")
        with gr.Accordion("Sampling", open=False), gr.Row():
            most = min(2048, chat.limit // 2)
            sampling = _sampling(most, tokens=min(512, most), temperature=0.2, top_k=40, top_p=0.9)
        outputs = [turns, window, text, count]
        events = _on_asking(go, text, answer, [text, turns, *sampling], outputs)
        stop.click(None, cancels=events)
        for trigger in (forget.click, window.clear):
            trigger(lambda: ([], [], "", ""), None, outputs, cancels=events)
    return app.queue(default_concurrency_limit=USERS_AT_ONCE, max_size=100)
