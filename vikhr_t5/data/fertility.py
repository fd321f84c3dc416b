"""How finely tokenizers cut a text: tokens per word, characters per token, the share of unknown tokens; and a chart.

    mistral = open_tokenizer("tokenizer.model.v1", name="Mistral")
    measure(mistral, ["Казнить нельзя, помиловать"]).tokens_per_word

Words are what `str.split` gives. Special tokens that a tokenizer puts around a text (BOS, EOS) are not counted. A token
that stands for unknown text counts as one, however long that text is: a tokenizer with many of them looks better than
it is, which is why their share stands beside the figures.
"""

import base64
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from rich.table import Table

from vikhr_t5.data.byte_vocabulary import ByteVocabulary
from vikhr_t5.data.vocabulary import AnyVocabulary, load_vocabulary, open_vocabulary
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path
from vikhr_t5.page import escape, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEEDS_CHART = "needs the extra [chart]: pip install 'vikhr-t5[chart]'"
CHART_FORMATS = (".png", ".svg", ".html")
# What a folder may hold, the surest first.
_IN_FOLDERS = ("vocabulary.json", "tokenizer.json", "tekken.json", "spiece.model", "tokenizer.model")
_VISIBLE = 0.001  # a share of unknown tokens that the chart tells about
_TEKKEN_KEYS = {"pattern", "default_vocab_size", "default_num_special_tokens"}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, for counting.

    Attributes:
        name: for tables.
        size: ids it has, special ones (and sentinels) included.
        encode: text -> ids, without special tokens around them.
        unk_id: the id of unknown text; None where nothing is unknown.
    """

    name: str
    size: int
    encode: Callable[[str], list[int]]
    unk_id: int | None


@dataclasses.dataclass(frozen=True)
class Fertility:
    """Counts of one tokenizer on one text."""

    name: str
    size: int
    words: int
    characters: int
    tokens: int
    unknown: int

    @property
    def tokens_per_word(self) -> float:
        """Fertility proper."""
        return self.tokens / self.words

    @property
    def characters_per_token(self) -> float:
        """Spaces are characters, line ends are not."""
        return self.characters / self.tokens

    @property
    def unknown_share(self) -> float:
        """Of the tokens."""
        return self.unknown / self.tokens


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Fertility:
    """Counts of `tokenizer` on texts, each encoded by itself. UserError when they hold no word."""
    words = characters = tokens = unknown = 0
    for text in texts:
        ids = tokenizer.encode(text)
        words += len(text.split())
        characters += len(text)
        tokens += len(ids)
        unknown += 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
    if not words or not tokens:
        raise UserError("no text to measure tokenizers on: the texts or files hold no word")
    return Fertility(tokenizer.name, tokenizer.size, words, characters, tokens, unknown)


def open_tokenizer(source: str, name: str | None = None) -> Tokenizer:
    """The tokenizer of a file or folder; what it is, the content says.

    Args:
        source: a SentencePiece model, a tokenizer.json, a tekken.json, a .tiktoken file of OpenAI's, "bytes"; or a
            folder that has one of them: a vocabulary/ folder of ours, a run folder, a Hugging Face model.
        name: for tables; the name of the file or folder where None.

    Raises:
        UserError: there is no such file, it is none of these, or the package that reads it is not installed.
    """
    if source == ByteVocabulary.source:
        return _of_vocabulary(open_vocabulary(source), name or source)
    path = Path(source)
    if path.is_dir():
        name, path = name or path.resolve().name, _in_folder(path)
    name = name or path.name.removesuffix(path.suffix if path.suffix in (".model", ".json", ".tiktoken") else "")
    if path.name == "vocabulary.json":
        return _of_vocabulary(load_vocabulary(path.parent), name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer {source!r}: {error.strerror}; give a local file or folder (of a model on the hub: hf download"
            f" NAME tokenizer.json)"
        ) from error
    if path.suffix == ".tiktoken":
        return _tiktoken(path, content, name)
    if content.lstrip()[:1] == b"{":
        return _json(path, content, name)
    return _sentencepiece(path, content, name)


def _in_folder(folder: Path) -> Path:
    for place in (folder, folder / "vocabulary"):
        for file in _IN_FOLDERS:
            if (place / file).exists():
                return place / file
    raise UserError(
        f"{folder} has no tokenizer: none of {', '.join(_IN_FOLDERS)}; another kind is written as tokenizer.json by"
        " transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
    )


def _of_vocabulary(vocabulary: AnyVocabulary, name: str) -> Tokenizer:
    unk_id = None if isinstance(vocabulary, ByteVocabulary) else vocabulary.unk_id
    return Tokenizer(name, vocabulary.size, vocabulary.encode, unk_id)


def _sentencepiece(path: Path, content: bytes, name: str) -> Tokenizer:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
        if not processor.GetPieceSize():
            raise RuntimeError("no pieces")
    except RuntimeError as error:
        raise UserError(
            f"{path} is no tokenizer: neither a SentencePiece model, nor JSON, nor named .tiktoken"
        ) from error
    return Tokenizer(name, processor.GetPieceSize(), processor.EncodeAsIds, processor.unk_id())


def _json(path: Path, content: bytes, name: str) -> Tokenizer:
    try:
        record = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not whole JSON ({error}); copy the file again") from error
    if isinstance(record.get("config"), dict) and record["config"].keys() >= _TEKKEN_KEYS:
        return _tekken(path, record, name)
    if "model" not in record:
        raise UserError(f"{path} is JSON, and neither a tokenizer.json of Hugging Face nor Mistral's tekken.json")
    try:
        from tokenizers import Tokenizer as FastTokenizer
    except ImportError as error:
        raise UserError(f"{path} needs the package tokenizers: pip install 'vikhr-t5[hf]'") from error
    try:
        tokenizer = FastTokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path} cannot be read by tokenizers: {str(error).splitlines()[0]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = record["model"]
    unk_id = model.get("unk_id")  # of Unigram; the other kinds name the token
    if unk_id is None and model.get("unk_token") is not None:
        unk_id = tokenizer.token_to_id(model["unk_token"])

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return Tokenizer(name, tokenizer.get_vocab_size(with_added_tokens=True), encode, unk_id)


def _tekken(path: Path, record: Mapping[str, Any], name: str) -> Tokenizer:
    """Mistral's tekken.json: byte pieces in the order of merges, of which the first `size` - specials are used."""
    config = record["config"]
    size, special = config["default_vocab_size"], config["default_num_special_tokens"]
    try:
        entries = record["vocab"][: size - special]
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has not the pieces that its config tells of; copy the file again") from error
    return _byte_pairs(path, {"name": name, "pat_str": config["pattern"], "mergeable_ranks": ranks}, name, size)


def _tiktoken(path: Path, content: bytes, name: str) -> Tokenizer:
    """A file of ranks. How text is cut before merging stands in tiktoken's code, under the name of the encoding."""
    try:
        from tiktoken_ext import openai_public
    except ImportError as error:
        raise UserError(f"{path} {NEEDS_CHART}") from error
    known = {name for name in openai_public.ENCODING_CONSTRUCTORS if name != "gpt2"}  # gpt2 is r50k in other files
    if path.stem not in known:
        hint = nearest(path.stem, known)
        raise UserError(f"{path}: a .tiktoken file must have the name of its encoding ({hint})")
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in pairs}
    except ValueError as error:
        raise UserError(f"{path} is no .tiktoken file: lines of a piece in base64 and its rank ({error})") from error
    # tiktoken would fetch this very file from the network.
    with mock.patch.object(openai_public, "load_tiktoken_bpe", return_value=ranks):
        encoding = openai_public.ENCODING_CONSTRUCTORS[path.stem]()
    return _byte_pairs(path, encoding, name)


def _byte_pairs(path: Path, encoding: Mapping[str, Any], name: str, size: int | None = None) -> Tokenizer:
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f"{path} {NEEDS_CHART}") from error
    try:
        tokenizer = tiktoken.Encoding(**{"special_tokens": {}, **encoding})
    except (AssertionError, ValueError) as error:
        raise UserError(f"{path} has not the pieces of {encoding['name']}; copy the file again") from error
    return Tokenizer(name, size or tokenizer.n_vocab, tokenizer.encode_ordinary, None)


_HEADINGS = ("tokenizer", "vocabulary", "tokens per word", "characters per token", "unknown")


def _row(one: Fertility) -> tuple[str, ...]:
    figures = f"{one.tokens_per_word:.3f}", f"{one.characters_per_token:.3f}", f"{one.unknown_share:.2%}"
    return one.name, f"{one.size:,}", *figures


def _measured_on(one: Fertility) -> str:
    return f"measured on {one.words:,} words, {one.characters:,} characters"


def table(measured: Sequence[Fertility]) -> Table:
    """A row per tokenizer, for a terminal. All are of the same text."""
    grid = Table(caption=_measured_on(measured[0]), caption_justify="left")
    for heading in _HEADINGS:
        grid.add_column(heading, justify="left" if heading == _HEADINGS[0] else "right", overflow="fold")
    for one in measured:
        grid.add_row(*_row(one))
    return grid


def write_chart(measured: Sequence[Fertility], output: str | os.PathLike[str]) -> None:
    """The figures against vocabulary size, as a picture (.png, .svg) or a page with the table (.html).

    Raises:
        UserError: another ending, or matplotlib is not installed.
    """
    suffix = Path(output).suffix.lower()
    if suffix not in CHART_FORMATS:
        raise UserError(f"{os.fspath(output)}: a chart is written as {', '.join(CHART_FORMATS)}")
    drawing = _drawing(measured, "png" if suffix == ".png" else "svg")
    if suffix == ".html":
        svg = drawing.decode()
        rows = [_html_row("th", _HEADINGS), *(_html_row("td", _row(one)) for one in measured)]
        values = {"drawing": svg[svg.index("<svg") :], "rows": "\n".join(rows), "note": _measured_on(measured[0])}
        write_page(output, Path(__file__).parents[1] / "fertility_template.html", "Tokenizers", **values)
        return
    with atomic_path(output) as temporary:
        temporary.write_bytes(drawing)


def _html_row(cell: str, values: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(value)}</{cell}>" for value in values) + "</tr>"


def _drawing(measured: Sequence[Fertility], kind: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"the chart {NEEDS_CHART}") from error
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vikhr-t5", "font.size": 9}):
        figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2)
        _panel(left, "tokens per word", measured, [one.tokens_per_word for one in measured])
        _panel(right, "characters per token", measured, [one.characters_per_token for one in measured])
        figure.draw_without_rendering()  # the layout, which the places of labels depend on
        _place_labels(left)
        _place_labels(right)
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def _panel(axes: "Axes", title: str, measured: Sequence[Fertility], values: Sequence[float]) -> None:
    """Points with labels; hollow where a part of the text is unknown."""
    for one, value in zip(measured, values, strict=True):
        known = one.unknown_share < _VISIBLE
        axes.plot(one.size, value, "o", color="#1f6feb", markerfacecolor="#1f6feb" if known else "white")
        label = one.name if known else f"{one.name} ({one.unknown_share:.1%} unknown)"
        axes.annotate(label, (one.size, value), (6, 3), textcoords="offset points").set_in_layout(False)
    low, high = min(one.size for one in measured) / 1.5, 1.5 * max(one.size for one in measured)
    step = 4 if high / low > 64 else 2
    ticks = [1000 * step**power for power in range(-3, 12) if low <= 1000 * step**power <= high]
    axes.set(title=title, xlabel="vocabulary size", xscale="log", xlim=(low, high), ylim=(0, 1.15 * max(values)))
    axes.set_xticks(ticks, [f"{tick / 1000:g}k" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _place_labels(axes: "Axes") -> None:
    """Each label beside its point, at the first of six places where it covers no point and no label before it."""
    from matplotlib.transforms import Bbox

    taken = []
    for line in axes.lines:
        ((x, y),) = axes.transData.transform(line.get_xydata())
        taken.append(Bbox.from_extents(x - 5, y - 5, x + 5, y + 5))
    right_edge = axes.get_window_extent().x1
    for label in axes.texts:
        for across, up in ((6, 3), (6, -9), (-6, 3), (-6, -9), (6, 13), (-6, 13)):
            label.set(position=(across, up), ha="left" if across > 0 else "right")
            box = label.get_window_extent()
            if box.x1 <= right_edge and not box.count_overlaps(taken):
                break
        taken.append(box)
