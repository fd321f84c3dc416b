"""Translated FLAN from local files of the published schemas, which the tests write; nothing is downloaded."""

import itertools
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seqio

from vikhr_t5.data.cache import cache
from vikhr_t5.errors import UserError

DATASETS = {
    "flan_translated_300k": "Vikhrmodels/Flan_translated_300k",
    "flan_alexwortega": "AlexWortega/flan",
    "flan2021_submix_ru": "d0rj/flan2021_submix_original-ru",
    **{
        f"flan_aya_{kind}": f"CohereForAI/aya_collection/translated_flan_{kind}"
        for kind in ("cot", "qa", "coqa", "gem_wiki", "lambada")
    },
}


@pytest.fixture(scope="module", autouse=True)
def flan():
    """The vocabulary is taken when the tasks are imported; bytes suffice where no other test has set one."""
    os.environ.setdefault("VIKHR_T5_VOCABULARY", "bytes")
    import tasks.flan

    return tasks.flan


def rows(task: str, count: int) -> list[dict[str, object]]:
    """As published."""
    texts = [(f"{task}: сколько будет {n} + {n}?", f"Будет {2 * n}.") for n in range(count)]
    if task in ("flan_translated_300k", "flan_alexwortega"):
        return [{"inputs": inputs, "target": target} for inputs, target in texts]
    if task == "flan2021_submix_ru":
        kind = {"task_source": "Flan2021", "task_name": "wmt16_translate", "template_type": "zs_noopt"}
        return [{"inputs": inputs, "targets": targets, **kind} for inputs, targets in texts]
    aya = {
        "dataset_name": "Flan-CoT-submix (T)",
        "sub_dataset_name": "-",
        "task_type": "question-answering",
        "template_id": 1,
        "script": "Cyrl",
        "split": "train",
    }
    return [
        {"id": n, "inputs": inputs, "targets": targets, "language": language, **aya}
        for language in ("rus", "ukr")
        for n, (inputs, targets) in enumerate(texts)
    ]


def write(folder: Path, made: list[dict[str, object]], form: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(made), folder / "train-00000-of-00001.parquet")
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(made)}).save_to_disk(folder)


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(tmp_path))
    return tmp_path


def pairs(task: str, split: str) -> list[tuple[str, str]]:
    examples = seqio.TaskRegistry.get(task).get_dataset(None, split, shuffle=False).as_numpy_iterator()
    return [(e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode()) for e in examples]


@pytest.mark.parametrize(("task", "form"), zip(DATASETS, itertools.cycle(["jsonl", "parquet", "saved"])))
def test_each_published_schema_gives_inputs_and_targets(data, task, form):
    write(data / DATASETS[task], rows(task, 25), form)
    found = pairs(task, "train") + pairs(task, "validation")
    assert sorted(found) == sorted(
        (row["inputs"], row.get("target", row.get("targets"))) for row in rows(task, 25)[:25]
    )


def test_an_instruction_ends_in_eos_on_both_sides(data):
    write(data / DATASETS["flan_alexwortega"], rows("flan_alexwortega", 20), "jsonl")
    task = seqio.TaskRegistry.get("flan_alexwortega")
    vocabulary = task.output_features["inputs"].vocabulary
    for example in task.get_dataset(None, "train", shuffle=False).as_numpy_iterator():
        for side in ("inputs", "targets"):
            assert example[side].tolist() == [*vocabulary.encode(example[f"{side}_pretokenized"].decode()), 1]


def test_the_split_depends_on_the_text_of_the_inputs_alone(data, flan):
    made = rows("flan_translated_300k", 1200)
    write(data / DATASETS["flan_translated_300k"], made, "jsonl")
    held_out = pairs("flan_translated_300k", "validation")
    assert 0.004 < len(held_out) / 1200 < 0.02
    assert not set(held_out) & set(pairs("flan_translated_300k", "train"))
    write(data / DATASETS["flan_alexwortega"], [*made[::-1], *rows("flan_alexwortega", 30)], "parquet")
    elsewhere = pairs("flan_alexwortega", "validation")
    assert set(held_out) <= set(elsewhere)
    assert flan.is_held_out("validation", {"inputs": held_out[0][0].encode()})


def test_a_blank_translation_is_left_out(data):
    made = rows("flan2021_submix_ru", 30)
    made[3]["targets"], made[4]["inputs"] = "", " \n"
    write(data / DATASETS["flan2021_submix_ru"], made, "parquet")
    found = pairs("flan2021_submix_ru", "train") + pairs("flan2021_submix_ru", "validation")
    assert len(found) == 28


def test_the_mixture_has_rates_by_size_with_a_cap(data, flan):
    mixture = seqio.MixtureRegistry.get("vikhr_flan")
    assert {task.name for task in mixture.tasks} == set(DATASETS) - {"flan_alexwortega"}
    sizes = {}
    for task, count in (("flan_translated_300k", 60), ("flan2021_submix_ru", 70), ("flan_aya_qa", 120)):
        write(data / DATASETS[task], rows(task, count), "jsonl")
        sizes[task] = len(pairs(task, "train"))
    assert {task: mixture.get_rate(seqio.TaskRegistry.get(task)) for task in sizes} == sizes
    rate = mixture.rate_per_task_name["flan2021_submix_ru"]
    assert rate.keywords == {"maximum": flan.RATE_MAXIMUM}
    assert rate(seqio.TaskRegistry.get("flan_aya_qa"), maximum=80) == 80


def test_the_mixture_is_cached_with_the_sizes_of_its_stores(data):
    mixture = seqio.MixtureRegistry.get("vikhr_flan")
    for number, task in enumerate(mixture.tasks):
        write(data / DATASETS[task.name], rows(task.name, 200 + number), "parquet")
    manifests = cache("vikhr_flan", "tasks.flan", data / "cache")
    sizes = {name: splits["train"].num_examples for name, splits in manifests.items()}
    assert sum(one["train"].num_examples + one["validation"].num_examples for one in manifests.values()) == 1421
    [written] = [json.loads(file.read_text()) for file in (data / "cache").rglob("*vikhr_flan*.json")]
    assert written["rates"] == sizes


def test_a_missing_set_says_what_is_missing_where_and_what_to_set(data):
    task = seqio.TaskRegistry.get("flan2021_submix_ru")
    with pytest.raises(UserError) as raised:
        task.source.list_shards("train")
    message = str(raised.value)
    assert f"no d0rj/flan2021_submix_original-ru in {data}/d0rj/flan2021_submix_original-ru" in message
    assert "unset VIKHR_T5_DATA_DIR to read it from the hub" in message
    assert "\n" not in message


def test_a_hub_out_of_reach_says_how_to_use_local_files(monkeypatch):
    monkeypatch.delenv("VIKHR_T5_DATA_DIR", raising=False)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'CohereForAI/aya_collection' on the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as raised:
        seqio.TaskRegistry.get("flan_aya_cot").source.list_shards("train")
    message = str(raised.value)
    assert "Couldn't reach 'CohereForAI/aya_collection'" in message
    assert "DIR/CohereForAI/aya_collection/translated_flan_cot and set VIKHR_T5_DATA_DIR=DIR" in message
    assert "\n" not in message


def test_the_hub_is_asked_for_the_published_config(monkeypatch):
    monkeypatch.delenv("VIKHR_T5_DATA_DIR", raising=False)
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs["split"]))
        return datasets.Dataset.from_list(rows("flan_aya_qa", 20))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(pairs("flan_aya_qa", "train") + pairs("flan_aya_qa", "validation")) == 20
    assert set(asked) == {(("CohereForAI/aya_collection", "translated_flan_qa"), "train")}


def test_a_wrong_field_name_is_answered_with_the_nearest(data):
    write(data / DATASETS["flan_translated_300k"], rows("flan2021_submix_ru", 20), "parquet")
    with pytest.raises(UserError, match=r"has no column 'target': nearest: targets"):
        list(seqio.TaskRegistry.get("flan_translated_300k").source.examples("train"))


def test_of_a_copied_repository_only_the_files_of_train_are_read(data):
    made = rows("flan_translated_300k", 30)
    folder = data / DATASETS["flan_translated_300k"] / "data [copy]"
    write(folder, made[:20], "parquet")
    pq.write_table(pa.Table.from_pylist(made[20:]), folder / "test-00000-of-00001.parquet")
    assert len(pairs("flan_translated_300k", "train") + pairs("flan_translated_300k", "validation")) == 20


def test_a_row_with_null_is_named_by_file_and_number(data):
    made = rows("flan_translated_300k", 20)
    made[6]["target"] = None
    write(data / DATASETS["flan_translated_300k"], made, "parquet")
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet, row 7: no 'target'"):
        list(seqio.TaskRegistry.get("flan_translated_300k").source.examples("train"))


def test_registering_reads_neither_disk_nor_network(flan, monkeypatch):
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", "/not/there")
    monkeypatch.setenv("VIKHR_T5_VOCABULARY", "not/there.model")
    monkeypatch.delattr(datasets, "load_dataset")
    flan.add_task("flan_nowhere", "no/where")
    try:
        seqio.Mixture("flan_nowhere_mixture", ["flan_nowhere"], seqio.mixing_rate_num_examples)
        with pytest.raises(UserError, match=r"VIKHR_T5_DATA_DIR='/not/there' is no folder"):
            seqio.TaskRegistry.get("flan_nowhere").source.list_shards("train")
    finally:
        seqio.TaskRegistry.remove("flan_nowhere")
