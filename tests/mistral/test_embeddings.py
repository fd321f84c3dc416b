"""`vikhr-mistral init` on a small model with Mistral's own tokenizer: rows, logits, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_mistral
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import safetensors
from vikhr_mistral import donor as donors
from vikhr_mistral import embeddings, merging, pieces, tokenizer_files
from vikhr_mistral.initialise import EMBEDDING, HEAD, init
from vikhr_t5.errors import UserError

WIDTH = 32


@pytest.fixture(scope="module")
def mistral() -> Any:
    return pieces.open_model("mistral")


@pytest.fixture(scope="module")
def merged(mistral: Any) -> merging.Merged:
    return merging.merge(mistral, donors.train(tiny_mistral.lines("ru", 4000), mistral, 5000), size=33000)


@pytest.fixture(scope="module")
def tokenizer_dir(merged: merging.Merged, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_files.write(merged.model, folder)
    return folder


def _base(folder: Path, mistral: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    model = tiny_mistral.model(32000, **settings)
    with torch.no_grad():
        for parameter in model.parameters():  # sizes that make a wrong row visible
            parameter.mul_(8)
    model.to(dtype).save_pretrained(folder)
    tokenizer_files.write(mistral, folder)
    return folder


@pytest.fixture(scope="module")
def base(mistral: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base(tmp_path_factory.mktemp("base"), mistral)


@pytest.fixture
def broken(base: Path, tmp_path: Path) -> Path:
    """A copy of the base, to damage."""
    return Path(shutil.copytree(base, tmp_path / "broken"))


def matrices(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return tensors[EMBEDDING], tensors[HEAD]


def old_ids_of(piece: str, encode: Callable[[str], list[int]]) -> list[int]:
    """By the old tokenizer as it is: a line end, which is a byte to it, keeps the dummy prefix away from a piece."""
    if piece.startswith("▁"):
        return encode(piece[1:])
    ids = encode("\n" + piece)
    assert ids[1] == 3 + 0x0A
    return ids[2:]


@pytest.mark.parametrize("method", ["mean", "weighted_mean", "exponential"])
def test_new_rows_are_the_stated_mean(
    base: Path, tokenizer_dir: Path, merged: merging.Merged, mistral: Any, tmp_path: Path, method: str
) -> None:
    init(base, tokenizer_dir, tmp_path / "out", method=method)
    processor, several = pieces.processor(mistral), 0
    for sign, old, new in zip((1, -1), matrices(base), matrices(tmp_path / "out"), strict=True):
        assert new.shape == (33024, WIDTH)
        assert torch.equal(new[:32000].view(torch.uint8), old.view(torch.uint8))
        for id, piece in enumerate(merged.added, start=32000):
            ids = old_ids_of(piece, processor.EncodeAsIds)
            several += len(ids) > 2
            weights = np.ones(len(ids))
            if method == "weighted_mean":
                weights = np.array([_bytes(processor.IdToPiece(i)) for i in ids])
                assert weights.sum() == len(piece.replace("▁", " ").encode())
            elif method == "exponential":  # the last piece counts most in the embedding, the first in the head
                weights = np.exp(sign * 2 * np.arange(len(ids)))
            expected = np.average(old[ids].double().numpy(), axis=0, weights=weights)
            np.testing.assert_allclose(new[id].double().numpy(), expected, atol=1e-6, rtol=0, err_msg=piece)
        np.testing.assert_allclose(new[33000:], old.mean(0).expand(24, WIDTH), atol=1e-6)
    assert several > 500


def _bytes(piece: str) -> int:
    return 1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())


def test_each_matrix_takes_its_own_rows(base: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    init(base, tokenizer_dir, tmp_path / "out")
    embedding, head = matrices(tmp_path / "out")
    assert (embedding[32000:33000] - head[32000:33000]).abs().mean() > 0.01


def test_drawn_rows_have_the_old_mean_and_covariance(base: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """(x − µ)ᵀ (1e-9·Σ)⁻¹ (x − µ) of a draw is chi-squared: its mean over n draws is D ± √(2D/n)."""
    for seed in (0, 0, 1):
        init(base, tokenizer_dir, tmp_path / f"{seed}", method="normal", seed=seed)
    old = matrices(base)[0].double()
    new = matrices(tmp_path / "0")[0][32000:33000].double()
    centered = old - old.mean(0)
    inverse = torch.linalg.inv(1e-9 * centered.T @ centered / len(old))
    distances = torch.einsum("nd,de,ne->n", new - old.mean(0), inverse, new - old.mean(0))
    assert distances.mean().item() == pytest.approx(WIDTH, abs=5 * (2 * WIDTH / 1000) ** 0.5)
    assert not torch.equal(new, matrices(tmp_path / "1")[0][32000:33000].double())


def test_transformers_draws_the_same_distribution(base: Path, tmp_path: Path) -> None:
    """`mean_resizing` itself, by the same measure: what "normal" claims to be."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    old = model.get_input_embeddings().weight.detach().double().clone()
    model.resize_token_embeddings(33000, mean_resizing=True)
    new = model.get_input_embeddings().weight.detach()[32000:].double()
    centered = old - old.mean(0)
    inverse = torch.linalg.inv(1e-9 * centered.T @ centered / len(old))
    distances = torch.einsum("nd,de,ne->n", new - old.mean(0), inverse, new - old.mean(0))
    assert distances.mean().item() == pytest.approx(WIDTH, abs=5 * (2 * WIDTH / 1000) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_text_of_old_pieces_has_the_logits_it_had(
    mistral: Any, tokenizer_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """In transformers, with no code of ours; also from shards, and with --verify."""
    old_dir = _base(tmp_path / "base", mistral, dtype)
    init(old_dir, tokenizer_dir, tmp_path / "out", verify=dtype == torch.bfloat16, max_shard_size="1MB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (old_dir, tmp_path / "out")]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (old_dir, tmp_path / "out")]
    assert [model.dtype for model in models] == [dtype, dtype]
    assert (models[1].config.vocab_size, len(tokenizers[1])) == (33024, 33000)
    text = "\n".join(tiny_mistral.lines("en", 30))
    old_ids, new_ids = (tokenizer(text, return_tensors="pt").input_ids for tokenizer in tokenizers)
    assert torch.equal(old_ids, new_ids)
    with torch.inference_mode():
        before, after = (model(old_ids[:, :400]).logits for model in models)
    assert torch.equal(before, after[..., :32000])
    assert before.float().std() > 0.01


def test_a_tied_head_stays_tied(mistral: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    old_dir = _base(tmp_path / "base", mistral, tie_word_embeddings=True)
    statistics = init(old_dir, tokenizer_dir, tmp_path / "out", verify=True)
    assert list(statistics["norms"]) == ["embed_tokens"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[EMBEDDING].shape[0] == 33024
    assert HEAD not in tensors
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape[0] == 33024
    with pytest.raises(UserError, match=r"base has one matrix for input and output .*: use --method mean"):
        init(old_dir, tokenizer_dir, tmp_path / "two", method="exponential")
    assert not (tmp_path / "two").exists()


def test_replacement_moves_kept_rows_with_their_pieces(base: Path, mistral: Any, tmp_path: Path) -> None:
    donor = donors.train(tiny_mistral.lines("ru", 2000) + tiny_mistral.lines("en", 2000), mistral, 3000)
    replaced = merging.merge(mistral, donor, "replacement")
    (tmp_path / "tokenizer").mkdir()
    tokenizer_files.write(replaced.model, tmp_path / "tokenizer")
    statistics = init(base, tmp_path / "tokenizer", tmp_path / "out", verify=True)
    ids = {piece.piece: id for id, piece in enumerate(mistral.pieces)}
    kept = 0
    for old, new in zip(matrices(base), matrices(tmp_path / "out"), strict=True):
        for id, piece in enumerate(replaced.model.pieces):
            if piece.piece in ids:
                assert torch.equal(new[id], old[ids[piece.piece]])
                kept += 1
    assert kept == 2 * statistics["rows"]["kept"] > 2000


def test_the_statistics_are_those_of_the_rows(base: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    statistics = init(base, tokenizer_dir, tmp_path / "out")
    assert statistics == json.loads((tmp_path / "out" / "init.json").read_text())
    assert statistics["rows"] == {"kept": 32000, "made": 1000, "fallback": 0, "padding": 24}
    for name, old, new in zip(("embed_tokens", "lm_head"), matrices(base), matrices(tmp_path / "out"), strict=True):
        assert statistics["norms"][name]["old"] == pytest.approx(old.norm(dim=1).mean().item(), rel=1e-5)
        assert statistics["norms"][name]["made"] == pytest.approx(new[32000:33000].norm(dim=1).mean().item(), rel=1e-5)


def test_a_piece_that_the_old_tokenizer_cannot_read_takes_the_mean_of_all(mistral: Any) -> None:
    old, new = pieces.ModelProto(), pieces.ModelProto()
    for model in (old, new):
        model.CopyFrom(mistral)
        del model.pieces[3:]
        model.trainer_spec.byte_fallback = False
        for place, piece in enumerate(["▁", "a", "b", "ab"]):
            model.pieces.add(piece=piece, score=-float(place))
    for piece in ("▁ab", "жук", "ba"):
        new.pieces.add(piece=piece, score=-9.0)
    plan = embeddings.plan(old, new)
    assert list(plan.kinds[7:11]) == ["made", "fallback", "made", "padding"]
    rows = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)  # the last is padding
    made = embeddings.new_rows(plan, rows)
    np.testing.assert_allclose(
        made[7:10], [(rows[3] + rows[6]) / 2, rows[:7].mean(0), (rows[5] + rows[4]) / 2], atol=1e-6
    )
    np.testing.assert_array_equal(made[:7], rows[:7])


def test_verification_finds_a_changed_row_and_leaves_nothing(
    base: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = embeddings.new_rows

    def wrong(*arguments: Any) -> np.ndarray:
        rows = right(*arguments)
        rows[31999, 0] = np.nextafter(rows[31999, 0], np.float32(9))
        return rows

    monkeypatch.setattr(embeddings, "new_rows", wrong)
    with pytest.raises(UserError, match=r"was not written as it is in .*: nothing was kept"):
        init(base, tokenizer_dir, tmp_path / "out", verify=True)
    assert not list(tmp_path.iterdir())


def _cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])


def _flip_header(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[20] ^= 0xFF
    (folder / "model.safetensors").write_bytes(bytes(content))


def _without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def _mixed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, HEAD: tensors[HEAD].half()}, folder / "model.safetensors")


def _other_tokenizer(folder: Path) -> None:
    model = pieces.open_model(folder)
    del model.pieces[20000:]
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"model\.safetensors is not a whole safetensors file"),
        (_flip_header, r"model\.safetensors is not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "does not describe a language model"),
        (lambda folder: (folder / "tokenizer.model").unlink(), r"tokenizer\.model: No such file"),
        (_other_tokenizer, "32,000 rows and its tokenizer 20,000 pieces: they do not belong together"),
        (_config(vocab_size=32064), r"is \(32000, 32\), and config\.json asks for \(32064, 32\)"),
        (_config(tie_word_embeddings=True), "though config.json says they are one matrix"),
        (_without(HEAD), r"has no lm_head\.weight, and config\.json does not tie it"),
        (_without(EMBEDDING), "only models of the Mistral and Llama family"),
        (_mixed, "stores its tensors as float16 and float32"),
    ],
)
def test_a_damaged_base_is_refused_in_one_line(
    broken: Path, tokenizer_dir: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(broken)
    with pytest.raises(UserError, match=message) as caught:
        init(broken, tokenizer_dir, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_bad_input(base: Path, tokenizer_dir: Path, mistral: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method 'maen' is not known; nearest: mean"):
        init(base, tokenizer_dir, tmp_path / "out", method="maen")
    with pytest.raises(UserError, match=r"tokenizer\.model: No such file"):
        init(base, tmp_path, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match=r"mine is not empty, and this command did not write it \(no init\.json\)"):
        init(base, tokenizer_dir, tmp_path / "mine")
    with pytest.raises(UserError, match="is not empty"):
        init(base, tokenizer_dir, base)
    other = pieces.ModelProto()
    other.CopyFrom(mistral)
    other.trainer_spec.bos_id, other.trainer_spec.eos_id = 2, 1
    (tmp_path / "swapped.model").write_bytes(other.SerializeToString())
    with pytest.raises(UserError, match="is not made from the base's tokenizer: its bos_id differs"):
        init(base, tmp_path / "swapped.model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="there is no /dev/full")
def test_a_full_disk_is_one_line(
    base: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as out:
            out.write(b"weights")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "write_sharded", write)
        with pytest.raises(UserError, match=r"the disk filled while the model was written: .* nothing was kept"):
            init(base, tokenizer_dir, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"no room for the model: 8\.53MB are needed and 1MB are free"):
        init(base, tokenizer_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())
