"""Translated FLAN: what becomes of the published rows, the split, the mixture; nothing is downloaded."""

import datasets
import published
import pyarrow as pa
import pytest
import seqio
from published import FLAN

from vikhr_t5.data import drops
from vikhr_t5.data.cache import cache
from vikhr_t5.data.pipeline import DatasetConfig, open_dataset
from vikhr_t5.errors import UserError

SUBMIX = FLAN["flan2021_submix_ru"]


def rows(task: str, count: int) -> list[dict[str, object]]:
    """As published, with `count` different texts."""
    return FLAN[task].table([f"{task}: сколько будет {n} + {n}?" for n in range(count)]).to_pylist()


def write(data, task: str, made: list[dict[str, object]], form: str) -> None:
    published.write(data / FLAN[task].folder, pa.Table.from_pylist(made, FLAN[task].schema), form)


def pairs(task: str, split: str) -> list[tuple[str, str]]:
    examples = seqio.TaskRegistry.get(task).get_dataset(None, split, shuffle=False).as_numpy_iterator()
    return [(e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode()) for e in examples]


def test_an_instruction_ends_in_eos_on_both_sides(data):
    write(data, "flan_alexwortega", rows("flan_alexwortega", 20), "jsonl")
    task = seqio.TaskRegistry.get("flan_alexwortega")
    vocabulary = task.output_features["inputs"].vocabulary
    for example in task.get_dataset(None, "train", shuffle=False).as_numpy_iterator():
        for side in ("inputs", "targets"):
            assert example[side].tolist() == [*vocabulary.encode(example[f"{side}_pretokenized"].decode()), 1]


def test_the_split_depends_on_the_text_of_the_inputs_alone(data, flan):
    made = rows("flan_translated_300k", 1200)
    write(data, "flan_translated_300k", made, "jsonl")
    held_out = pairs("flan_translated_300k", "validation")
    assert 0.004 < len(held_out) / 1200 < 0.02
    assert not set(held_out) & set(pairs("flan_translated_300k", "train"))
    write(data, "flan_alexwortega", [*made[::-1], *rows("flan_alexwortega", 30)], "parquet")
    elsewhere = pairs("flan_alexwortega", "validation")
    assert set(held_out) <= set(elsewhere)
    assert flan.is_held_out("validation", {"inputs": held_out[0][0].encode()})


def test_a_blank_translation_is_left_out_and_counted(data):
    made = rows("flan2021_submix_ru", 30)
    made[3]["targets"], made[4]["inputs"] = "", " \n"
    write(data, "flan2021_submix_ru", made, "parquet")
    before = drops.counts()
    found = pairs("flan2021_submix_ru", "train") + pairs("flan2021_submix_ru", "validation")
    assert len(found) == 28
    assert drops.counts() - before == {"blank": 2}


def test_each_template_type_is_a_task(data, flan):
    made = rows("flan2021_submix_ru", 40)
    write(data, "flan2021_submix_ru", made, "parquet")
    found = {
        kind: {inputs for split in ("train", "validation") for inputs, _ in pairs(f"flan2021_submix_ru_{kind}", split)}
        for kind in flan.TEMPLATE_TYPES
    }
    assert found == {
        kind: {row["inputs"] for row in made if row["template_type"] == kind} for kind in flan.TEMPLATE_TYPES
    }


def test_a_template_type_that_flan_has_not_is_named(data):
    made = rows("flan2021_submix_ru", 20)
    made[7]["template_type"] = "zsopt"
    write(data, "flan2021_submix_ru", made, "parquet")
    with pytest.raises(UserError, match=r"^d0rj/.*: a row's template_type is 'zsopt'; nearest: zs_opt"):
        list(seqio.TaskRegistry.get("flan2021_submix_ru_fs_opt").source.examples("train"))


def test_the_set_that_a_row_is_from_goes_with_it(data):
    made = rows("flan_aya_cot", 12)
    write(data, "flan_aya_cot", made, "jsonl")
    found = seqio.TaskRegistry.get("flan_aya_cot").get_dataset(None, "train", shuffle=False).as_numpy_iterator()
    names = {example["inputs_pretokenized"].decode(): example["task_name"].decode() for example in found}
    assert names == {
        row["inputs"]: "Flan-cot-submix (T)" if n % 3 else "esnli" for n, row in enumerate(made) if not n % 2
    }


def test_the_mixture_has_the_rates_of_flan_2022(data, flan):
    mixture = seqio.MixtureRegistry.get("vikhr_flan")
    sizes = {"flan_aya_qa": 10_000, "flan_aya_gem_wiki": 50_000, "flan_aya_lambada": 30_001}
    for task, size in sizes.items():
        seqio.TaskRegistry.get(task).num_input_examples = lambda split, size=size: size
    try:
        rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    finally:
        for task in sizes:
            del seqio.TaskRegistry.get(task).num_input_examples
    templates, aya = 59 * 30_000, {"flan_aya_qa": 10_000, "flan_aya_gem_wiki": 30_000, "flan_aya_lambada": 30_000}
    flan_2021 = templates + sum(aya.values())
    expected = {f"flan2021_submix_ru_{kind}": 0.4 * templates / flan_2021 / 4 for kind in flan.TEMPLATE_TYPES}
    expected |= {task: 0.4 * rate / flan_2021 for task, rate in aya.items()}
    assert rates == pytest.approx(
        {**expected, "flan_translated_300k": 0.52, "flan_aya_cot": 0.05, "flan_aya_coqa": 0.03}
    )
    assert sum(rates.values()) == pytest.approx(1)


@pytest.mark.parametrize(("maximum", "temperature"), [(None, 1.0), (25, 1.0), (25, 2.0), (None, 4.0)])
def test_rates_by_size_with_cap_and_temperature(data, vocabulary, maximum, temperature):
    sizes = {"flan_translated_300k": 300, "flan_alexwortega": 150}
    for task, count in sizes.items():
        write(data, task, rows(task, count), "parquet")

    def rate(task):
        return seqio.mixing_rate_num_examples(task, maximum=maximum, temperature=temperature)

    seqio.MixtureRegistry.add("flan_by_size", list(sizes), default_rate=rate)
    try:
        manifests = cache("flan_by_size", "tasks.flan", data / "cache")
    finally:
        seqio.MixtureRegistry.remove("flan_by_size")
    counts = {task: splits["train"].num_examples for task, splits in manifests.items()}
    assert counts["flan_translated_300k"] > 1.9 * counts["flan_alexwortega"]
    expected = {task: min(count, maximum or count) ** (1 / temperature) for task, count in counts.items()}
    config = DatasetConfig("flan_by_size", {"inputs": 64, "targets": 32}, "train", 8, cache_dir=str(data / "cache"))
    found = open_dataset(config, vocabulary).example_rates
    assert found == pytest.approx({task: rate / sum(expected.values()) for task, rate in expected.items()})


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
        return datasets.Dataset.from_list(rows("flan_aya_qa", 40))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(pairs("flan_aya_qa", "train") + pairs("flan_aya_qa", "validation")) == 20
    assert set(asked) == {(("CohereForAI/aya_collection", "translated_flan_qa"), "train")}


def test_a_wrong_field_name_is_answered_with_the_nearest(data):
    published.write(data / FLAN["flan_translated_300k"].folder, SUBMIX.table(["Сколько будет 2 + 2?"]), "parquet")
    with pytest.raises(UserError, match=r"has no column 'target': nearest: targets"):
        list(seqio.TaskRegistry.get("flan_translated_300k").source.examples("train"))


def test_of_a_copied_repository_only_the_files_of_train_are_read(data):
    made = FLAN["flan_translated_300k"].table([f"Сколько будет {n} + {n}?" for n in range(30)])
    folder = data / FLAN["flan_translated_300k"].folder / "data [copy]"
    published.write(folder, made.slice(20), "parquet")
    (folder / "train-00000-of-00001.parquet").rename(folder / "test-00000-of-00001.parquet")
    published.write(folder, made.slice(0, 20), "parquet")
    assert len(pairs("flan_translated_300k", "train") + pairs("flan_translated_300k", "validation")) == 20


def test_a_row_with_null_is_named_by_file_and_number(data):
    made = rows("flan_translated_300k", 20)
    made[6]["target"] = None
    write(data, "flan_translated_300k", made, "parquet")
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet, row 7: 'target' is null"):
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
