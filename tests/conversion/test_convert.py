"""Roads between formats, to the bit; what a run can start from; and what happens to damaged input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import tiny_model

from conversion import convert, verify
from conversion.huggingface import HuggingFaceModel
from conversion.stored import MemoryModel, arrays, load
from conversion.vikhr import Checkpoint
from vikhr_t5.cli_gin import readable_checkpoint
from vikhr_t5.errors import UserError
from vikhr_t5.train import checkpoints
from vikhr_t5.train.state import TrainState

Make = Callable[..., MemoryModel]
ROOT = Path(__file__).resolve().parents[2]
VARIANTS = [
    ("v1.0", {"num_heads": 5}),
    ("v1.0", {"logits_via_embedding": False, "mlp_activations": ("silu",)}),
    ("v1.1", {"vocab_size": 2048}),
    ("v1.1", {"logits_via_embedding": True, "num_encoder_layers": 4, "num_decoder_layers": 1}),
    ("umT5", {"num_heads": 5}),
    ("umT5", {"logits_via_embedding": True}),
]


def bits(model: MemoryModel | Checkpoint) -> list[bytes]:
    return [np.ascontiguousarray(model.read(*array)).tobytes() for array in arrays(model.config)]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "fields"), VARIANTS)
def test_every_road_keeps_every_bit(make_model: Make, tmp_path: Path, variant: str, fields: dict, stored: str) -> None:
    """vikhr -> hf -> vikhr -> t5x -> vikhr -> hf, and at each stop the bits that were given."""
    model = make_model(variant, stored=stored, **fields)
    given, previous = bits(model), model
    scanned = model.config.relative_bias_per_layer
    for number, stop in enumerate(["hf", "vikhr", "t5x", "vikhr", "hf"]):
        convert.write_model(previous, tmp_path / str(number), stop, scanned=scanned)
        previous = convert.open_model(tmp_path / str(number), stop, model.vocabulary, model.config)
        assert previous.dtype == stored
        assert bits(previous) == given, stop
    files = [sorted((tmp_path / number).glob("*.safetensors")) for number in ("0", "4")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_t5x_layouts_are_both_written(make_model: Make, tmp_path: Path) -> None:
    for variant, scanned, array in (
        ("v1.1", False, "target.encoder.layers_0.mlp.wo.kernel"),
        ("umT5", True, "target.encoder.encoder.mlp.wo.kernel"),
    ):
        model = make_model(variant)
        convert.write_model(model, tmp_path / variant, "t5x", scanned=scanned)
        assert (tmp_path / variant / "checkpoint_1000" / array).is_dir()
        assert bits(convert.open_model(tmp_path / variant, "t5x", model.vocabulary)) == bits(model)


def test_a_dtype_is_rounded_to_nearest_on_every_road(make_model: Make, tmp_path: Path) -> None:
    model = make_model("v1.1")
    for stop in convert.FORMATS:
        convert.write_model(model, tmp_path / stop, stop, dtype="bfloat16")
        written = convert.open_model(tmp_path / stop, stop, model.vocabulary)
        assert written.dtype == "bfloat16"
        assert jax.tree.all(jax.tree.map(np.array_equal, load(written), load(model, "bfloat16")))


def test_training_restores_what_was_converted(tmp_path: Path) -> None:
    model = tiny_model()
    state = jax.jit(model.init_state)(jax.random.key(3))
    given = MemoryModel(jax.device_get(state.params), model.config, model.vocabulary, 7)
    convert.write_model(given, tmp_path / "c", "vikhr")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model.abstract_state())
    restored, progress = checkpoints.restore(tmp_path / "c", TrainState(*like))
    assert progress["step"] == int(restored.step) == 7
    assert restored.opt_state is None
    assert jax.tree.all(jax.tree.map(np.array_equal, restored.params, state.params))


@pytest.mark.parametrize("source", ["hf", "t5x"])
def test_a_run_starts_from_any_format(make_model: Make, tmp_path: Path, source: str) -> None:
    model = make_model("v1.1")
    convert.write_model(model, tmp_path / "source", source)
    assert convert.find(tmp_path / "source")[0] == source
    start = convert.initial_checkpoint(tmp_path / "source", tmp_path / "run", model.config, model.vocabulary)
    assert bits(Checkpoint(start)) == bits(model)
    assert convert.initial_checkpoint(start, tmp_path / "run", model.config, model.vocabulary) == start


def test_a_run_goes_on_without_the_checkpoint_that_it_began_with(make_model: Make, tmp_path: Path) -> None:
    model, restore = make_model("v1.1"), checkpoints.RestoreCheckpointConfig(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="no such folder"):
        readable_checkpoint(restore, str(tmp_path / "run"), model)
    own = tmp_path / "run" / "checkpoints" / "1000"
    convert.write_model(model, own, "vikhr")
    assert readable_checkpoint(restore, str(tmp_path / "run"), model) == restore
    (own / "progress.json").unlink()
    with pytest.raises(UserError, match="no such folder"):
        readable_checkpoint(restore, str(tmp_path / "run"), model)


def test_large_models_are_verified_by_some_layers(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "SAMPLED_ABOVE", 1000)
    model = make_model("v1.1", num_encoder_layers=7, num_decoder_layers=4)
    convert.write_model(model, tmp_path / "out", "hf")
    assert verify.verify(model, tmp_path / "out", verify.LINES[:2])
    model.params["encoder"]["layers"]["mlp"]["wo"]["kernel"][3] *= 1.5  # the middle of seven
    assert not verify.verify(model, tmp_path / "out", verify.LINES[:2])


def test_without_transformers_arrays_are_compared(make_model: Make, tmp_path: Path) -> None:
    model = make_model("v1.1")
    convert.write_model(model, tmp_path / "out", "hf")
    assert convert.verify(model, "memory", "vikhr", tmp_path / "out", "hf", with_transformers=False)
    model.params["encoder"]["layers"]["mlp"]["wo"]["kernel"][1, 2, 3] += 1e-6
    assert not convert.verify(model, "memory", "vikhr", tmp_path / "out", "hf", with_transformers=False)


def test_a_file_cut_short_or_changed_is_told(make_model: Make, tmp_path: Path) -> None:
    model = make_model("v1.1")
    weights = tmp_path / "m" / "model.safetensors"

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            HuggingFaceModel(tmp_path / "m")

    convert.write_model(model, tmp_path / "m", "hf")
    whole = weights.read_bytes()
    for damaged in (
        whole[:-5],
        whole[:60],
        b"",
        whole[:9] + bytes([whole[9] ^ 4]) + whole[10:],
        b"\xff" * 8 + whole[8:],
    ):
        weights.write_bytes(damaged)
        refused("is not a whole safetensors file")
    weights.unlink()
    refused("holds no weights")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    weights.write_bytes(whole)
    refused("model_type 'llama' is no T5")
    (tmp_path / "m" / "config.json").write_text('{"model_type"')
    refused("no configuration of a Hugging Face model")


def test_shards_that_do_not_fit_are_told(make_model: Make, tmp_path: Path) -> None:
    convert.write_model(make_model("v1.1"), tmp_path / "m", "hf", max_shard_size=100_000)
    shard = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        HuggingFaceModel(tmp_path / "m")
    shard.write_bytes(sorted((tmp_path / "m").glob("model-*.safetensors"))[0].read_bytes())
    with pytest.raises(UserError, match="the shard is of another model"):
        HuggingFaceModel(tmp_path / "m")
    shard.write_bytes(content)
    index = tmp_path / "m" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"].pop("lm_head.weight")
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"1 missing: lm_head\.weight"):
        HuggingFaceModel(tmp_path / "m")
    listed["weight_map"].pop("shared.weight")
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"missing: .*shared"):
        HuggingFaceModel(tmp_path / "m")
    index.write_text("[]")
    with pytest.raises(UserError, match="is not an index of shards"):
        HuggingFaceModel(tmp_path / "m")


def test_a_configuration_that_does_not_fit_lists_every_difference(make_model: Make, tmp_path: Path) -> None:
    convert.write_model(make_model("v1.1"), tmp_path / "m", "hf")
    path = tmp_path / "m" / "config.json"
    fields = json.loads(path.read_text())
    for changed, said in {
        ("num_layers", 1): r"unknown: encoder\.block\.1",
        ("d_ff", 64): "of another shape",
        ("num_decoder_layers", 9): r"missing: decoder\.block\.3",
        ("feed_forward_proj", "relu"): r"1 missing.*|missing: encoder\.block\.0\.layer\.1\.DenseReluDense\.wi",
        ("relative_attention_num_buckets", 64): "relative_attention_num_buckets is 64, and this network has 32",
        ("feed_forward_proj", "gated-swiglu"): "feed_forward_proj 'gated-swiglu' is unknown",
    }.items():
        path.write_text(json.dumps(fields | dict([changed])))
        with pytest.raises(UserError, match=said):
            HuggingFaceModel(tmp_path / "m")


def test_a_damaged_checkpoint_of_ours_is_told(make_model: Make, tmp_path: Path) -> None:
    convert.write_model(make_model("v1.1"), tmp_path / "c", "vikhr")
    chunk = tmp_path / "c" / "params" / "token_embedder.embedding" / "0.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"has .* of .* bytes"):
        Checkpoint(tmp_path / "c")
    chunk.unlink()
    with pytest.raises(UserError, match="is missing"):
        Checkpoint(tmp_path / "c")
    chunk.write_bytes(content)
    config = tmp_path / "c" / "model_config.json"
    config.write_text(config.read_text().replace('"emb_dim": 32', '"emb_dim": 33'))
    with pytest.raises(UserError, match="of another shape"):
        Checkpoint(tmp_path / "c")


@pytest.mark.slow
def test_killed_at_any_moment_no_half_model_is_left(make_model: Make, tmp_path: Path) -> None:
    """kill -9 at twenty moments of a conversion: the destination is absent or whole, the source as it was."""
    model = make_model("v1.1", num_encoder_layers=24, num_decoder_layers=24, emb_dim=256, mlp_dim=1024)
    convert.write_model(model, tmp_path / "source", "vikhr")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "source").rglob("*")}
    command = [sys.executable, "-m", "vikhr_t5.cli", "convert", "--from", "vikhr", "--to", "hf", "--no-verify"]
    arguments = [*command, str(tmp_path / "source"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    subprocess.run(arguments, check=True, env=environment, capture_output=True)
    whole, seconds = HuggingFaceModel(tmp_path / "out"), time.monotonic() - start
    expected = bits(whole)
    killed = 0
    for moment in np.random.default_rng(0).uniform(0.3, 1.0, 20) * seconds:
        if (tmp_path / "out").exists():
            (tmp_path / "out").rename(tmp_path / f"done{time.monotonic_ns()}")
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
        if (tmp_path / "out").exists():
            assert bits(HuggingFaceModel(tmp_path / "out")) == expected
    assert killed >= 10
    subprocess.run(arguments, check=True, env=environment, capture_output=True)
    assert bits(HuggingFaceModel(tmp_path / "out")) == expected
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".old"))]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "source").rglob("*")}
