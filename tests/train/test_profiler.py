"""A trace of the steps that were asked for, in the files that viewers open."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from tiny_run import run

from vikhr_t5.errors import UserError
from vikhr_t5.train.profiler import WARM_UP, Profiler


def test_it_traces_the_steps_after_the_warm_up_and_no_others(tmp_path):
    profiler = Profiler(tmp_path, steps=2, steps_to_do=10)
    for number in range(WARM_UP + 4):
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            done = jnp.ones(()) + number
        profiler.dispatched(done)
    profiler.close()
    (xplane,) = tmp_path.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(xplane)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(steps) == [WARM_UP, WARM_UP + 1]
    (perfetto,) = tmp_path.rglob("perfetto_trace.json.gz")
    assert "traceEvents" in json.loads(gzip.decompress(perfetto.read_bytes()))


def test_an_interrupted_run_leaves_what_was_traced(tmp_path):
    profiler = Profiler(tmp_path, steps=5, steps_to_do=10)
    for _ in range(WARM_UP + 1):
        profiler.dispatched(jnp.ones(()))
    profiler.close()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_nothing_is_traced_unless_asked_for(tmp_path):
    profiler = Profiler(tmp_path / "profile", steps=0, steps_to_do=1)
    for _ in range(5):
        profiler.dispatched(jnp.ones(()))
    profiler.close()
    assert not (tmp_path / "profile").exists()


def test_a_run_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(UserError, match="TRAIN_STEPS"):
        Profiler(tmp_path, steps=5, steps_to_do=6)


def test_a_run_is_profiled_in_its_folder(tmp_path):
    run(tmp_path, total_steps=WARM_UP + 2, profile_steps=2, evaluate=False)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
