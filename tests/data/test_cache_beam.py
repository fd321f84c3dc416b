"""Caching through Apache Beam's local runner: the files of a local run, and its errors."""

import logging
import time

import pytest
from cached_tasks import files, store_of

from vikhr_t5.data import cache_beam
from vikhr_t5.data.cache import cache
from vikhr_t5.errors import UserError

RUNNER = "FnApiRunner"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)


@pytest.mark.parametrize(
    ("dedup", "mode"),
    [
        (None, "multi_threading"),
        ("exact", "multi_threading"),
        pytest.param("exact", "multi_processing", marks=pytest.mark.slow),
    ],
)
def test_files_are_those_of_a_local_run(module, data, dedup, mode):
    pages = (data / "pages.txt").read_text("utf-8")
    (data / "pages.txt").write_text(f"{pages}\n\n{pages[:30_000]}", encoding="utf-8")
    name = module(piece_bytes=40_000)
    task = f"{name}_text"
    local = cache(task, name, "local", dedup_method=dedup)[task]["train"]
    options = f"--direct_running_mode={mode} --direct_num_workers=2"
    beam = cache(task, name, "cache", dedup_method=dedup, beam_runner=RUNNER, beam_options=options)[task]["train"]
    assert len(beam.shards) > 3
    assert beam == local
    assert bool(beam.dropped) == (dedup is not None)
    assert files(task) == files(task, "local")


def test_goes_on_where_it_was_stopped(module, monkeypatch):
    name = module(piece_bytes=40_000)
    task = f"{name}_text"
    cache(task, name, "local", splits=["train"])
    process, done = cache_beam._Write.process, []

    def process_some(self, job):
        if len(done) == 2:
            raise ZeroDivisionError  # no UserError: a worker that is lost
        done.append(job.index)
        process(self, job)

    monkeypatch.setattr(cache_beam._Write, "process", process_some)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        cache(task, name, "cache", splits=["train"], beam_runner=RUNNER)
    before = sorted(done)
    monkeypatch.setattr(cache_beam._Write, "process", lambda self, job: [done.append(job.index), process(self, job)][1])
    started = time.time()
    cache(task, name, "cache", splits=["train"], beam_runner=RUNNER)
    assert sorted(done) == list(range(len(done)))
    assert len(before) == 2
    assert files(task) == files(task, "local")
    folder = store_of(task).directory
    assert [(folder / file).stat().st_mtime < started for file in sorted(files(task))] == [
        number in before for number in range(len(done))
    ]


def test_bad_data(module, data):
    (data / "pages.txt").write_bytes((data / "pages.txt").read_bytes() + b"\n\n\xff\n")
    name = module(piece_bytes=40_000)
    with pytest.raises(UserError, match=r"^\S*pages\.txt, line \d+: not UTF-8 [^\n]*$"):
        cache(f"{name}_text", name, "cache", beam_runner=RUNNER)


def test_no_such_runner(module):
    name = module()
    with pytest.raises(UserError, match="no Beam runner FlinkRuner: nearest: FlinkRunner"):
        cache(f"{name}_text", name, "cache", beam_runner="FlinkRuner")
