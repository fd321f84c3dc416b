"""The command: its result is plain transformers or PEFT, its positions are those of the base, bad input is named."""

import json
import subprocess
import sys

import peft
import pytest
import tiny_mistral
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from vikhr_mistral.anchoring import AnchorConfig
from vikhr_mistral.corpus import tokenize
from vikhr_mistral.loss_forward import loss_forward
from vikhr_mistral.models import LoraConfig, load_model
from vikhr_mistral.packing import Collator, DocumentRows
from vikhr_mistral.pretrain import pretrain
from vikhr_mistral.reference import Reference, adapters_off
from vikhr_t5.errors import UserError

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model, its tokenizer, and corpora."""
    folder = tmp_path_factory.mktemp("base")
    tiny_mistral.folder(folder / "model")
    for language in ("ru", "en"):
        (folder / f"{language}.txt").write_text("\n\n".join(tiny_mistral.lines(language, 200)))
        (folder / f"{language}-held-out.txt").write_text("\n\n".join(tiny_mistral.lines(language, 20, 200)))
    return folder


def config(base, output, **changes):
    train = {"max_steps": 3, "batch_size": 4, "per_device_batch_size": 2, "warmup_steps": 1, "precision": "float32"}
    values = {
        "model": str(base / "model"),
        "output_dir": str(output),
        "corpora": {
            "ru": {"files": str(base / "ru.txt"), "share": 0.75},
            "en": {"files": str(base / "en.txt"), "share": 0.25},
        },
        "held_out": {"ru": {"files": str(base / "ru-held-out.txt"), "rows": 4}},
        "sequence_length": 48,
        "train": {**train, "learning_rate": "1e-2", "log_every": 1, "save_every": 2, "data_workers": 0},
        **changes,
    }
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def changed_rows(before, after, name):
    return (before[name] != after[name]).any(-1).nonzero()[:, 0].tolist()


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer("Привет, мир", return_tensors="pt").input_ids
torch.save(model(ids).logits, sys.argv[2])
print(model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] - ids.shape[1])
assert not [name for name in sys.modules if name.startswith("vikhr")]
"""


def test_full_training_gives_a_plain_folder(base, tmp_path):
    """Loaded in a process without our code: the weights are the trained ones."""
    pretrain(config(base, tmp_path / "run"), ["anchor.loss=slerp", "anchor.t=0.5"])
    model = tmp_path / "run" / "model"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, model, tmp_path / "logits.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "3"
    before, after = weights(base / "model"), weights(model)
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    ids = AutoTokenizer.from_pretrained(model)("Привет, мир", return_tensors="pt").input_ids
    expected = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-4)
    assert json.loads((model / "config.json").read_text())["use_cache"] is True
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/ru", "loss/en", "kl/ru", "tokens_per_second"} <= set(lines[2])
    # Again: the run has ended, nothing is trained, the result is written again.
    pretrain(tmp_path / "run.yaml", ["anchor.loss=slerp", "anchor.t=0.5"])
    assert all(torch.equal(value, weights(model)[name]) for name, value in after.items())


def test_lora_gives_a_peft_folder(base, tmp_path):
    """Merged it is the trained model; embeddings and head are in it; the base's fingerprint is beside it."""
    pretrain(config(base, tmp_path / "run", trainable="lora"), ["anchor.loss=linear", "anchor.t=0.5"])
    folder = tmp_path / "run" / "model"
    plain = AutoModelForCausalLM.from_pretrained(base / "model")
    model = peft.PeftModel.from_pretrained(plain, folder).eval()
    ids = torch.tensor([[1, 50, 60, 70]])
    logits = model(ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=1e-4)
    assert (folder / "base_fingerprint.json").exists()
    before, after = weights(base / "model"), merged.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"):
        assert (before[name] != after[name]).any()
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


@pytest.mark.parametrize("trainable", ["lora", "new_embeddings", "embeddings"])
def test_only_the_rows_that_may_change_do(base, tmp_path, trainable):
    first = 380
    overrides = ["lora.embeddings=new", f"new_rows_from={first}"]
    pretrain(config(base, tmp_path / "run", trainable=trainable), overrides)
    folder, before = tmp_path / "run" / "model", weights(base / "model")
    if trainable == "embeddings":
        after = weights(folder)
    else:
        plain = AutoModelForCausalLM.from_pretrained(base / "model")
        after = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
    rows = len(before["lm_head.weight"])
    assert changed_rows(before, after, "lm_head.weight") == list(range(0 if trainable == "embeddings" else first, rows))
    embedded = changed_rows(before, after, "model.embed_tokens.weight")  # of pieces that the text has
    assert embedded
    assert min(embedded) >= (0 if trainable == "embeddings" else first)
    others = [name for name in before if "embed_tokens" not in name and "lm_head" not in name]
    moved = [name for name in others if not torch.equal(before[name], after[name])]
    assert bool(moved) == (trainable == "lora")


@pytest.mark.parametrize("trainable", ["lora", "embeddings", "new_embeddings"])
def test_what_is_trained_beside_frozen_weights_is_float32(base, trainable):
    model = load_model(
        str(base / "model"),
        400,
        dtype="bfloat16",
        trainable=trainable,
        lora=LoraConfig(embeddings="full"),
        new_rows_from=380,
    )
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_adapters_begin_alike_and_are_switched_off_without_a_change_of_what_is_trained(base):
    first, second = (load_model(str(base / "model"), 400, dtype="float32", trainable="lora", seed=s) for s in (1, 1))
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    before = [parameter.requires_grad for parameter in first.parameters()]
    for parameter in first.parameters():
        parameter.data += 0.01 * parameter.requires_grad
    ids = torch.tensor([[1, 50, 60]])
    with adapters_off(first):
        assert [parameter.requires_grad for parameter in first.parameters()] == before
        assert torch.equal(first(ids).logits, AutoModelForCausalLM.from_pretrained(base / "model")(ids).logits)
    with torch.no_grad():
        assert (first(ids).logits - AutoModelForCausalLM.from_pretrained(base / "model")(ids).logits).abs().max() > 1e-3


def test_a_run_refuses_another_base(base, tmp_path):
    path = config(base, tmp_path / "run")
    overrides = ["anchor.loss=linear", "anchor.t=0.5", f"anchor.reference={tmp_path / 'reference'}"]
    tiny_mistral.folder(tmp_path / "reference")
    pretrain(path, overrides)
    tiny_mistral.folder(tmp_path / "reference", seed=1)  # same path, other weights
    with pytest.raises(UserError, match="begun with reference_fingerprint"):
        pretrain(path, overrides)


# ---- two vocabularies ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers():
    old = tiny_mistral.tokenizer(tiny_mistral.lines("en", 200), 400)
    new = tiny_mistral.extended(old, tiny_mistral.lines("ru", 200), 700)
    assert len(new) > len(old)
    return old, new


TEXT = st.lists(st.sampled_from(["hello ", "the world", "Привет", " мир", "ё", "1", "?", "\n", "ко", "to"]), min_size=1)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(TEXT.map("".join).filter(str.strip), min_size=1, max_size=8))
def test_anchored_positions_are_those_of_the_base(tokenizers, tmp_path_factory, texts):
    """Wherever a position is anchored, the base's own tokenizer gives the same ids up to it and the same next one."""
    old, new = tokenizers
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = DocumentRows(tokenize(str(folder / "a.jsonl"), new, folder, base_tokenizer=old), 7, seed=0)
    theirs = {(1, *old(text, add_special_tokens=False)["input_ids"], 2) for text in texts}
    count = sum(len(ids) for ids in (new(text, add_special_tokens=False)["input_ids"] for text in texts)) + 2 * len(
        texts
    )
    document, anchored = [], []
    for i in range(-(-2 * count // 7)):
        row = rows[i]
        for token, target, flag in zip(row["input_ids"], row["targets"], row["anchored"], strict=True):
            document.append(int(token))
            anchored.append(bool(flag))
            if target == -100:
                assert document[-1] == 2
                assert anchored == [tuple(document) in theirs] * len(document)
                document, anchored = [], []


def test_both_kinds_of_documents_occur(tokenizers, tmp_path):
    old, new = tokenizers
    (tmp_path / "a.txt").write_text("hello the world\n\nПривет, который\n\nhello мир")
    assert tokenize(str(tmp_path / "a.txt"), new, tmp_path, base_tokenizer=old).alike.tolist() == [True, False, False]


def test_the_original_model_is_a_reference_for_an_extended_one(tokenizers, tmp_path):
    """A base of fewer rows, on packed rows of both kinds of documents: its distance at the anchored tokens is that of
    the original model on each document alone."""
    old, new = tokenizers
    texts = ["hello the world", "Привет, который мир", "the time of year"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    corpus = tokenize(str(tmp_path / "a.txt"), new, tmp_path, base_tokenizer=old)
    model, original = tiny_mistral.model(len(new), seed=1), tiny_mistral.model(len(old), seed=2)
    row = DocumentRows(corpus, len(corpus.tokens), seed=0)[0]
    inputs, reference = Collator()([row]), Reference(original)
    anchor = AnchorConfig("linear", 1.0, over="shared", base_tokenizer="x")
    with loss_forward(model, anchor, reference.head, shared_size=len(old)):
        hidden = reference.hidden(model, None, inputs)
        losses, index = model(**inputs, t=1.0, base_hidden=hidden)
    checked = 0
    for text in texts:
        ids = [1, *new(text, add_special_tokens=False)["input_ids"], 2]
        start = next(i for i in range(len(row["input_ids"])) if row["input_ids"][i : i + len(ids)].tolist() == ids)
        here = (index >= start) & (index < start + len(ids) - 1)
        assert here.sum() == len(ids) - 1
        if not row["anchored"][start]:
            assert (losses.weight[here] == 0).all()
            torch.testing.assert_close(losses.loss[here], losses.cross_entropy[here])
            continue
        alone = torch.tensor([[1, *old(text, add_special_tokens=False)["input_ids"], 2]])
        log_b = original(alone).logits[0, :-1].log_softmax(-1)
        log_m = model(alone).logits[0, :-1, : len(old)].log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_m, log_b, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(losses.loss[here], kl, atol=1e-5, rtol=1e-4)
        checked += 1
    assert checked == 2


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=/nowhere"], "/nowhere: no such folder"),
        (["corpora.ru.files=/nowhere.txt"], "/nowhere.txt: no such file"),
        (["corpora={}"], "corpora is empty"),
        (["trainable=lora", "lora.target_modules=[q_prj]"], "no module 'q_prj'; nearest: .*q_proj"),
        (["trainable=new_embeddings", "new_rows_from=9999"], "no row from new_rows_from = 9999"),
        (["held_out.ru.rows=1", "sequence_length=99999"], "does not fill a row of 99999"),
        (["dtype=bfloat16"], "dtype bfloat16 needs train.precision bfloat16, not float32"),
        (["anchor.loss=slurp"], "anchor: loss is 'slurp'; nearest: slerp"),
        (["train.max_stepz=1"], "train: unknown setting 'max_stepz'; nearest: max_steps"),
        (["anchor.loss=linear", "anchor.t=0.5", "anchor.reference_8bit=true"], "needs the package bitsandbytes"),
        (["anchor.loss=linear", "anchor.t=0.5", "anchor.reference=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(base, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        pretrain(config(base, tmp_path / "run"), overrides)
    assert "\n" not in str(error.value)


def test_a_model_smaller_than_its_tokenizer_and_a_corrupted_one(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    tiny_mistral.model(100).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="the tokenizer has 400 pieces and the model 100 rows"):
        pretrain(config(base, tmp_path / "run"), [f"model={tmp_path / 'small'}"])
    file = tmp_path / "small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="small: the model cannot be loaded"):
        pretrain(config(base, tmp_path / "run"), [f"model={tmp_path / 'small'}"])
