"""A run: what must not change its losses does not; it goes on exactly; the reference stays the original."""

import json
import math
import os
import shutil
import signal

import numpy as np
import peft
import pytest
import tiny_mistral
import torch
from torch.utils.flop_counter import FlopCounterMode

from vikhr_mistral.anchoring import AnchorConfig
from vikhr_mistral.loss_forward import loss_forward
from vikhr_mistral.metrics import flops_per_token, peak_flops
from vikhr_mistral.packing import Collator, DocumentRows, MixedRows
from vikhr_mistral.reference import Reference
from vikhr_mistral.training import TrainConfig, train
from vikhr_t5.errors import UserError
from vikhr_t5.report import report
from vikhr_t5.run_folder import read_run

STEPS, BATCH, LENGTH = 6, 4, 24


pytestmark = pytest.mark.usefixtures("environment")


class Documents:
    def __init__(self, seed):
        random = np.random.default_rng(seed)
        lengths = random.integers(3, 40, 40)
        self.ends, self.alike = np.cumsum(lengths), None
        self.tokens = random.integers(3, 64, self.ends[-1]).astype(np.uint16)


def rows(count=STEPS * BATCH):
    return MixedRows([DocumentRows(Documents(i), LENGTH, 0, i) for i in range(2)], [3, 1], count)


def settings(**changes):
    plain = {"max_steps": STEPS, "batch_size": BATCH, "warmup_steps": 1, "learning_rate": 1e-2, "precision": "float32"}
    return TrainConfig(
        **{**plain, "log_every": 1, "save_every": 2, "keep_checkpoints": 9, "data_workers": 0, **changes}
    )


def lora(dropout=0.0):
    """Adapters, trained copies of embeddings and head, and dropout that a resume must repeat."""
    config = peft.LoraConfig(
        r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    return peft.get_peft_model(tiny_mistral.model(64), config)


def losses(folder, key="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["kind"] == "train"]


def test_losses_do_not_depend_on_the_passes_of_a_step(tmp_path):
    for name, passes in (("one", 4), ("four", 1)):
        config = settings(per_device_batch_size=passes, loss_chunk=1024 if passes == 4 else 7)
        assert train(config, tiny_mistral.model(64), rows(), output_dir=tmp_path / name, source_names=["ru", "en"])
    for key in ("loss", "loss/ru", "loss/en", "grad_norm"):
        assert losses(tmp_path / "one", key) == pytest.approx(losses(tmp_path / "four", key), rel=1e-5)
    assert abs(losses(tmp_path / "one")[-1] - losses(tmp_path / "one")[0]) > 0.01  # the weights have moved


def test_the_loss_is_transformers_own(tmp_path):
    """The first step's, on the same rows: labels moved by one, the mean over the tokens that have a target."""
    train(settings(max_steps=1), tiny_mistral.model(64), rows(), output_dir=tmp_path)
    batch = Collator()([rows()[i] for i in range(BATCH)])
    labels = torch.cat([torch.full((BATCH, 1), -100), batch["targets"][:, :-1]], 1)
    last = batch["targets"][:, -1]  # transformers has no way to say what follows the row
    model = tiny_mistral.model(64)
    output = model(batch["input_ids"], position_ids=batch["position_ids"], labels=labels, use_cache=False)
    count, cut = (labels[:, 1:] != -100).sum(), (last != -100).sum()
    rest = torch.nn.functional.cross_entropy(output.logits[:, -1], last, reduction="sum", ignore_index=-100)
    assert losses(tmp_path) == [pytest.approx(((output.loss * count + rest) / (count + cut)).item(), rel=1e-6)]


@pytest.mark.parametrize("start", [2, 4])
def test_a_run_goes_on_exactly(tmp_path, start):
    """Weights, moments, schedule, data, dropout, t: from checkpoint `start` on, all losses are the same."""
    anchor = AnchorConfig("slerp", 0.2, t_end=0.8)
    for name in ("whole", "resumed"):
        if name == "resumed":
            shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
            for step in range(start + 2, STEPS + 1, 2):
                shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"checkpoint-{step}")
        model = lora(dropout=0.3)
        assert train(
            settings(),
            model,
            rows(),
            output_dir=tmp_path / name,
            anchor=anchor,
            reference=Reference(),
            source_names=["a", "b"],
        )
    for key in ("loss", "objective", "kl", "t", "learning_rate", "grad_norm"):
        one, other = losses(tmp_path / "whole", key), losses(tmp_path / "resumed", key)
        assert len(one) == len(other) == STEPS
        assert one == pytest.approx(other, rel=1e-9)
    assert losses(tmp_path / "whole", "kl")[0] < 1e-7  # the model begins as the base
    assert losses(tmp_path / "whole", "kl")[-1] > 1e-4


def test_the_reference_without_adapters_is_the_base(tmp_path):
    """After training and after a resume: bitwise the hidden states and the head of the untouched model."""
    model, base = lora(), tiny_mistral.model(64)
    train(settings(), model, rows(), output_dir=tmp_path)
    for trained in (model, lora()):  # the second is restored from the last checkpoint
        if trained is not model:
            train(settings(), trained, rows(), output_dir=tmp_path)
        inputs = Collator()([rows()[0]])
        seen = {}
        with loss_forward(trained, AnchorConfig("linear", 1.0)):
            hidden = Reference().hidden(trained, trained, inputs)
            loss, _ = trained(**inputs, t=1.0, base_hidden=hidden)
            seen["kl"] = loss.distance
        expected = base.model(inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)[0]
        assert torch.equal(hidden, expected)
        kept = inputs["targets"].flatten() != -100
        log_b = base.lm_head(expected).flatten(0, 1)[kept].log_softmax(-1)
        log_m = trained(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
        log_m = log_m.flatten(0, 1)[kept].log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_m, log_b, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(seen["kl"], kl, atol=1e-6, rtol=1e-4)
        assert kl.mean() > 1e-4


def test_another_base_batch_or_seed_is_refused(tmp_path):
    train(settings(), tiny_mistral.model(64), rows(), output_dir=tmp_path, must_stay={"base": "abc"})
    with pytest.raises(UserError, match="begun with base = 'abc', and now it is 'xyz'"):
        train(settings(), tiny_mistral.model(64), rows(), output_dir=tmp_path, must_stay={"base": "xyz"})
    with pytest.raises(UserError, match="begun with seed = 0, and now it is 1"):
        train(settings(seed=1), tiny_mistral.model(64), rows(), output_dir=tmp_path, must_stay={"base": "abc"})


class Signal:
    """Rows that send SIGTERM to this process when one is read."""

    def __init__(self, rows, at):
        self.rows, self.at = rows, at

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if i == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.rows[i]


def test_sigterm_saves_and_stops(tmp_path):
    plain, stopped = tmp_path / "plain", tmp_path / "stopped"
    train(settings(), tiny_mistral.model(64), rows(), output_dir=plain)
    handler = signal.getsignal(signal.SIGTERM)
    config = settings(save_every=0)
    assert not train(config, tiny_mistral.model(64), Signal(rows(), 2 * BATCH), output_dir=stopped)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(losses(stopped)) < STEPS
    assert train(config, tiny_mistral.model(64), rows(), output_dir=stopped)
    assert losses(stopped) == pytest.approx(losses(plain), rel=1e-9)


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vikhr_mistral.training.AnchoredTrainer._save_rng_state", full_disk)
        with pytest.raises(OSError, match="No space"):
            train(settings(), tiny_mistral.model(64), rows(), output_dir=tmp_path)
    assert list(tmp_path.glob("checkpoints/*")) == []
    assert train(settings(), tiny_mistral.model(64), rows(), output_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 6, "per_device_batch_size": 4, "max_steps": 4},
            "batch_size 6 is not a multiple of per_device_batch_size 4",
        ),
        ({"max_steps": 7}, "needs 28 rows .* there are 24"),
        ({"optimizer": "paged_adamw_8bit"}, "needs the package bitsandbytes"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(settings(**changes), tiny_mistral.model(64), rows(), output_dir=tmp_path)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules_warm_up_again_and_end_where_they_should(tmp_path, schedule):
    config = settings(
        max_steps=10, warmup_steps=2, schedule=schedule, decay_steps=4, min_learning_rate=0.1, save_every=0
    )
    train(config, tiny_mistral.model(64), rows(40), output_dir=tmp_path)
    rates = [rate / 1e-2 for rate in losses(tmp_path, "learning_rate")]
    expected = {
        "cosine": [0.1 + 0.45 * (1 + math.cos(math.pi * i / 8)) for i in range(8)],
        "linear": [1 - 0.9 * i / 8 for i in range(8)],
        "constant": [1.0] * 8,
        "wsd": [1.0] * 4 + [1 - 0.9 * i / 4 for i in range(4)],
    }[schedule]
    assert rates == pytest.approx([0.5, 1.0, *expected], rel=1e-6)


def test_report_draws_the_run(tmp_path):
    held_out = {"ru": [rows()[i] for i in range(5)]}
    train(
        settings(eval_every=3), tiny_mistral.model(64), rows(), held_out, output_dir=tmp_path, source_names=["ru", "en"]
    )
    run = read_run(tmp_path)
    assert list(run.train.steps) == [1, 2, 3, 4, 5, 6]
    assert list(run.evals["ru"].steps) == [0, 3, 6]
    assert run.finished
    assert "loss/en" in run.train.names("loss/")
    report([tmp_path], tmp_path / "report.html")
    assert "Throughput" in (tmp_path / "report.html").read_text()


def test_held_out_loss_is_the_mean_over_tokens(tmp_path):
    """Whatever the batches: 5 rows in batches of 2."""
    held_out = [rows()[i] for i in range(5)]
    train(
        settings(max_steps=1, per_device_batch_size=2),
        tiny_mistral.model(64),
        rows(),
        {"x": held_out},
        output_dir=tmp_path,
    )
    first = next(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"eval"' in line)
    batch = Collator()(held_out)
    logits = tiny_mistral.model(64)(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_flops_are_those_that_torch_counts(trained):
    length = 16
    model = tiny_mistral.model(64, attn_implementation="eager")
    if trained == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["q_proj"]))
    ids = torch.randint(64, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    # With adapters torch skips what lies before the first of them, a tenth of this small model.
    assert flops_per_token(model, length) == pytest.approx(
        counter.get_total_flops() / ids.numel(), rel=1e-9 if trained == "full" else 0.1
    )


def test_no_mfu_where_the_peak_is_unknown(tmp_path):
    assert peak_flops(torch.device("cpu")) is None
    train(settings(max_steps=1), tiny_mistral.model(64), rows(), output_dir=tmp_path)
    assert "mfu" not in (tmp_path / "metrics.jsonl").read_text()
