"""Benchmarks through lm-eval: prompts against the originals, chance, oracle, what is cut, what is taken up again."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import benchmark_sets
import datasets
import numpy as np
import pytest
import sacrebleu
import tiny_mistral
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from vikhr_t5 import benchmark, benchmark_models
from vikhr_t5.benchmark_results import BENCHMARKS, DEFAULT
from vikhr_t5.errors import UserError

ACCURACIES = [name for name, about in BENCHMARKS.items() if about.metric == "acc"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return benchmark_sets.write_all(tmp_path_factory.mktemp("data"), items=40, of_subject=1)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return benchmark_sets.tiny_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return tiny_mistral.folder(tmp_path_factory.mktemp("models") / "mistral")


def model_of(folder, name=None):
    return benchmark_models.find_model(f"{name}={folder}" if name else str(folder))


def requests(tasks, limit=None):
    """(context, continuation) of all requests of lm-eval's tasks, in order."""
    found = []
    for task in tasks.values():
        task.set_fewshot_seed(benchmark.SEED)
        task.build_all_requests(limit=limit)
        found += [instance.args for instance in task.instances]
    return found


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", ["xwinograd_ru", "xnli_ru"])
def test_stock_prompts_are_those_of_lm_eval(name, shots, data_dir, tmp_path, monkeypatch):
    """lm-eval's own task, which reads a repository as the hub has it, gives the same requests, letter by letter."""
    dataset, config = {"xwinograd_ru": ("Muennighoff/xwinograd", "ru"), "xnli_ru": ("facebook/xnli", "ru")}[name]
    splits = {"xwinograd_ru": {"test": name}, "xnli_ru": {"validation": name, "train": f"{name}_train"}}[name]
    repository = tmp_path / dataset
    for split, file in splits.items():
        (repository / config).mkdir(parents=True, exist_ok=True)
        lines = (data_dir / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
        rows.to_parquet(repository / config / f"{split}-00000-of-00001.parquet")
    card = [{"config_name": config, "data_files": [{"split": s, "path": f"{config}/{s}-*"} for s in splits]}]
    (repository / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = benchmark._LM_EVAL_TASKS / name.partition("_")[0]
    stock = TaskManager(include_path=[folder], include_defaults=False).load([name])["tasks"]
    stock[name].set_config("num_fewshot", shots)
    ours = benchmark.load(name, data_dir, shots).tasks
    assert requests(ours) == requests(stock)
    assert len(requests(ours)) == 40 * {"xwinograd_ru": 2, "xnli_ru": 3}[name]


def test_the_stock_prompts_are_what_the_documentation_says(tmp_path):
    data = benchmark_sets.write(
        tmp_path,
        xnli_ru=[{"premise": "Кошка спит", "hypothesis": "она не бежит.", "label": 0}],
        xwinograd_ru=[
            {"sentence": "Кубок не влез в чемодан: _ был велик.", "option1": "кубок", "option2": "он", "answer": "1"}
        ],
    )
    assert requests(benchmark.load("xnli_ru", data).tasks) == [
        ("", " Кошка спит, правильно? Да, она не бежит."),
        ("", " Кошка спит, правильно? Так, она не бежит."),
        ("", " Кошка спит, правильно? Нет, она не бежит."),
    ]
    assert requests(benchmark.load("xnli_ru_seq2seq", data).tasks) == [
        ("Кошка спит, правильно? <extra_id_0>, она не бежит.", f"<extra_id_0> {answer}")
        for answer in ("Да", "Так", "Нет")
    ]
    assert requests(benchmark.load("xwinograd_ru", data).tasks) == [
        ("Кубок не влез в чемодан: кубок", " был велик."),
        ("Кубок не влез в чемодан: он", " был велик."),
    ]
    assert requests(benchmark.load("xwinograd_ru_seq2seq", data).tasks) == [
        ("Кубок не влез в чемодан: <extra_id_0> был велик.", "<extra_id_0> кубок"),
        ("Кубок не влез в чемодан: <extra_id_0> был велик.", "<extra_id_0> он"),
    ]


# The prompt of github.com/NLP-Core-Team/mmlu_ru, mmlu_ru.py, for a model without roles; written from that file.
HEADLINE = "Ниже приведены вопросы с множественным выбором (с ответами) по истории Европы в старшей школе.\n\n"
SHOT = "Вопрос {{ № {n}?\nA. раз\nB. два \nC. 3\nD. \nОтвет: {answer}\n\n"
QUESTION = "Что  выбрать?\nA. {{x}}\nB. б\nC. в\nD. г\nОтвет:"


@pytest.mark.parametrize("shots", [0, 2, 5])
def test_the_mmlu_prompt_letter_by_letter(shots, tmp_path):
    def row(question, choices, answer):
        return {"question_ru": question, "choices_ru": choices, "answer": answer}

    history = "high_school_european_history"
    dev = [{**row(f"Вопрос {{{{ № {n}?", ["раз", "два ", "3", ""], n % 4), "subject": history} for n in range(5)]
    asked = {**row("Что  выбрать?", ["{{x}}", "б", "в", "г"], 2), "subject": history}
    rest = [row for row in benchmark_sets.mmlu(1) if row["subject"] != history]
    rest_dev = [row for row in benchmark_sets.mmlu(5) if row["subject"] != history]
    data = benchmark_sets.write(tmp_path, ru_mmlu=[asked, *rest], ru_mmlu_dev=[*rest_dev, *dev])
    loaded = benchmark.load("ru_mmlu", data, shots)
    (name,) = [name for name in loaded.tasks if name.endswith(history)]
    examples = "".join(SHOT.replace("{n}", str(n)).replace("{answer}", "ABCD"[n % 4]) for n in range(shots))
    prompt = HEADLINE + examples + QUESTION
    assert requests({name: loaded.tasks[name]}) == [(prompt, f" {letter}") for letter in "ABCD"]


def test_mmlu_is_the_group_that_lm_eval_loads(data_dir, monkeypatch):
    """`lm_eval --include_path tasks/benchmarks --tasks ru_mmlu`: the same prompts, from the hub's dataset."""
    ours = benchmark.load("ru_mmlu", data_dir, 2)
    by_subject = {task.get_config("dataset_name"): task.dataset for task in ours.tasks.values()}
    asked = []

    def hub(path, name, **settings):
        asked.append((path, settings))
        return by_subject[name]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    folder = Path(benchmark.__file__).parents[1] / "tasks/benchmarks"
    theirs = TaskManager(include_path=[folder], include_defaults=False).load(["ru_mmlu"])
    assert len(asked) == 57
    assert asked[0] == ("NLPCoreTeam/mmlu_ru", {"revision": "refs/convert/parquet"})
    assert len(theirs["groups"]) == 5
    for task in theirs["tasks"].values():
        assert task.get_config("num_fewshot") == 5
        task.set_config("num_fewshot", 2)
    assert requests(theirs["tasks"]) == requests(ours.tasks)


def test_mmlu_has_the_subjects_and_categories_of_the_original(data_dir):
    """hendrycks/test, categories.py: 57 subjects; STEM 18, humanities 13, social sciences 12, other 14."""
    tasks = benchmark.load("ru_mmlu", data_dir).tasks.values()
    categories = [task.get_config("metadata")["category"] for task in tasks]
    sizes = {name: categories.count(name) for name in dict.fromkeys(categories)}
    assert sizes == {"STEM": 18, "humanities": 13, "social_sciences": 12, "other": 14}
    assert len({task.get_config("metadata")["subject"] for task in tasks}) == 57
    assert len({task.get_config("description") for task in tasks}) == 57
    by_subject = {task.get_config("metadata")["subject"]: task for task in tasks}
    for subject, category in (
        ("global_facts", "other"),
        ("econometrics", "social_sciences"),
        ("prehistory", "humanities"),
    ):
        assert by_subject[subject].get_config("metadata")["category"] == category
    assert "по фактам о мире.\n\n" in by_subject["global_facts"].get_config("description")


def test_the_yaml_files_agree_with_the_table_of_benchmarks(data_dir):
    for name, about in BENCHMARKS.items():
        loaded = benchmark.load(name, data_dir)
        assert loaded.num_fewshot == (about.num_fewshot or 0)
        for task in loaded.tasks.values():
            (metric,) = task.higher_is_better()
            assert metric == about.metric
            assert task.higher_is_better()[metric] == (metric != "bits_per_byte")
            if metric == "acc":
                choices = task.doc_to_choice(next(iter(task.eval_docs)))
                assert about.chance == 1 / len(choices)


# ---- chance and oracle -----------------------------------------------------------------------------------------------


class Oracle(LM):
    """Knows the rows, and finds the right answer in the text that it is asked to score."""

    def __init__(self, right: bool):
        super().__init__()
        self.right = right

    def loglikelihood(self, requests, **_):
        return [(-1.0 + (self._is_answer(request) == self.right), False) for request in requests]

    def _is_answer(self, request):
        (context, continuation), row = request.args, request.doc
        if "choices_ru" in row:
            return continuation == " " + "ABCD"[row["answer"]]
        if "premise" in row:
            return (" Да" in continuation, " Так" in continuation, " Нет" in continuation)[row["label"]]
        option = row[f"option{row['answer']}"]
        before = row["sentence"].partition("_")[0]
        return context.endswith(before + option) or continuation == f"<extra_id_0> {option}"

    def generate_until(self, requests, **_):
        raise NotImplementedError

    loglikelihood_rolling = generate_until


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", ACCURACIES)
def test_an_oracle_scores_one_and_its_opposite_nothing(name, shots, tmp_path):
    rows = benchmark_sets.xnli(12)
    for row, answer in zip(rows, [0, 1, 2] * 4, strict=True):
        row |= {"premise": f"Тезис {answer}", "hypothesis": "Вывод."}  # no "Да" of their own
    distinct = [row for row in benchmark_sets.xwinograd(40) if row["option1"] != row["option2"]]
    data = benchmark_sets.write(
        tmp_path, xnli_ru=rows, xnli_ru_train=benchmark_sets.xnli(9, 1), xwinograd_ru=distinct,
        ru_mmlu=benchmark_sets.mmlu(1), ru_mmlu_dev=benchmark_sets.mmlu(5, 1),
    )  # fmt: skip
    loaded = benchmark.load(name, data, shots)
    for right, expected in ((True, 1.0), (False, 0.0)):
        value, stderr, parts = benchmark.score(loaded, benchmark.run(Oracle(right), loaded))
        assert value == expected
        assert all(part[0] == expected for part in parts.values())
        assert stderr in (0.0, None)


def within_chance(result, errors=3.0):
    """Answers are drawn at random, independently of the model, so the number of right ones is binomial. (Of ru_mmlu all
    subjects have equally many items here, but not all categories equally many subjects: the variance is of the mean of
    category means.) Three standard errors: a right program fails once in 370 draws; the draws here are fixed."""
    chance = BENCHMARKS[result.benchmark].chance
    deviation = math.sqrt(chance * (1 - chance) / result.items)
    if result.benchmark == "ru_mmlu":
        per_subject = chance * (1 - chance) / (result.items / 57)
        deviation = math.sqrt(sum(per_subject / count for count in (18, 13, 12, 14)) / 16)
    return abs(result.value - chance) < errors * deviation


@pytest.mark.parametrize("shots", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_random_models_score_chance(shots, data_dir, t5, mistral):
    models = [model_of(t5), model_of(mistral)]
    results = benchmark.benchmark(models, ACCURACIES, data_dir=data_dir, num_fewshot=shots, batch_size=32)
    measured = {(result.model, result.benchmark) for result in results}
    assert measured == {("t5", name) for name in ACCURACIES} | {("mistral", name) for name in DEFAULT}
    for result in results:
        assert within_chance(result), result
        assert result.items == (57 if result.benchmark == "ru_mmlu" else 40)
        expected = math.sqrt(result.value * (1 - result.value) / (result.items - 1))
        if result.benchmark != "ru_mmlu":
            assert result.stderr == pytest.approx(expected)
        else:
            assert sorted(result.parts) == ["STEM", "humanities", "other", "social_sciences"]
            assert result.value == pytest.approx(np.mean([value for value, _ in result.parts.values()]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_models_score_chance_on_a_thousand_items(seed, tmp_path):
    data = benchmark_sets.write(
        tmp_path / "data", xnli_ru=benchmark_sets.xnli(1000, seed), xwinograd_ru=benchmark_sets.xwinograd(1000, seed),
        ru_mmlu=benchmark_sets.mmlu(20, seed), ru_mmlu_dev=benchmark_sets.mmlu(5, seed + 1),
    )  # fmt: skip
    models = [
        model_of(benchmark_sets.tiny_t5(tmp_path / "t5", seed=seed)),
        model_of(tiny_mistral.folder(tmp_path / "mistral", seed=seed)),
    ]
    for result in benchmark.benchmark(models, ACCURACIES, data_dir=data, batch_size=64):
        assert within_chance(result), result


# ---- what lm-eval's backend computes ---------------------------------------------------------------------------------


def test_log_likelihoods_of_an_encoder_decoder(t5):
    """The context, with EOS, is the encoder's input, the continuation, without, the decoder's; an empty context leaves
    EOS alone. Against the sums of log-softmaxes of the model as transformers loads it: lm-eval's own backend ties the
    head of this v1.1 to its embedding."""
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5)
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    with benchmark_models.opened(model_of(t5), None, 4, None) as model:
        pairs = [("Кошка спит", " и видит сны"), ("", " Да, правильно"), ("Москва — столица", " России")]
        found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
        for (context, continuation), (value, _) in zip(pairs, found, strict=True):
            inputs = model.tokenizer(context, return_tensors="pt").input_ids
            targets = model.tokenizer(continuation, add_special_tokens=False, return_tensors="pt").input_ids
            assert inputs[0, -1] == model.tokenizer.eos_token_id
            assert targets[0, -1] != model.tokenizer.eos_token_id
            decoder = torch.cat([torch.zeros(1, 1, dtype=torch.long), targets[:, :-1]], dim=1)
            with torch.no_grad():
                logits = plain(input_ids=inputs, decoder_input_ids=decoder).logits.log_softmax(-1)
            assert value == pytest.approx(logits.gather(2, targets[..., None]).sum().item(), abs=1e-4)


@pytest.fixture(scope="module")
def mistral_with_bos(tmp_path_factory):
    """Its tokenizer puts BOS before every text, as Mistral's own."""
    folder = tiny_mistral.folder(tmp_path_factory.mktemp("models") / "mistral_with_bos")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "added"), [("mistral", [0, 0]), ("mistral_with_bos", [1, 0]), ("t5", [0, 1])])
def test_perplexity_is_of_bytes_whatever_the_tokenizer(name, added, request):
    """Bits per byte against a sum over the text's own pieces by hand: without what the tokenizer adds to them."""
    folder = request.getfixturevalue(name)
    (result,) = benchmark.benchmark([model_of(folder)], ["perplexity_ru"], limit=6, batch_size=2)
    loaded = benchmark.load("perplexity_ru")
    (task,) = loaded.tasks.values()
    texts = [task.eval_docs[number]["text"] for number in range(6)]
    total = 0.0
    with benchmark_models.opened(model_of(folder), None, 1, None) as model:
        seq2seq = model.backend == "seq2seq"
        for text in texts:
            pieces = model.tokenizer(text, add_special_tokens=False).input_ids
            whole = model.tokenizer(text).input_ids
            assert whole[added[0] : len(whole) - added[1]] == pieces
            assert len(whole) == len(pieces) + sum(added)
            ids = [model.prefix_token_id, *pieces]
            for start in range(1, len(ids), model.max_length):  # windows that do not overlap, each after one token
                window = torch.tensor([ids[start - 1 : start + model.max_length]])
                begun = torch.nn.functional.pad(window[:, 1:-1], (1, 0))
                read = {"input_ids": window[:, :1], "decoder_input_ids": begun} if seq2seq else window[:, :-1]
                with torch.no_grad():
                    logits = (model.model(**read) if seq2seq else model.model(read)).logits.log_softmax(-1)
                total -= logits.gather(2, window[:, 1:, None]).sum().item()
    size = sum(len(text.encode()) for text in texts)
    assert result.value == pytest.approx(total / math.log(2) / size, rel=1e-4)
    assert result.stderr > 0


def test_perplexity_of_second_halves(t5):
    (task,) = benchmark.load("perplexity_ru").tasks.values()
    (halves,) = benchmark.benchmark([model_of(t5)], ["perplexity_ru_seq2seq"], limit=6)
    assert halves.items == 6
    assert halves.value > 0
    doc = task.eval_docs[0]
    assert doc["first_half"] + doc["second_half"] == doc["text"]
    assert len(doc["text"]) <= 1000


def test_translation_is_scored_by_sacrebleu(mistral, tmp_path):
    pairs = [{"ru": "Открыть файл", "en": "Open a file"}, {"ru": "Закрыть", "en": "Close it"}]
    pairs += [{"ru": f"Строка {number}", "en": f"Line {number}"} for number in range(4)]
    data = benchmark_sets.write(tmp_path, translate=pairs)
    loaded = benchmark.load("translate_ru_en", data, 2)
    loaded.tasks["translate_ru_en"].set_config("generation_kwargs", {"max_gen_toks": 12}, update=True)
    with benchmark_models.opened(model_of(mistral), None, 4, None) as model:
        samples = benchmark.run(model, loaded)
    value, stderr, _ = benchmark.score(loaded, samples)
    answers = [item["filtered_resps"][0] for item in samples["translate_ru_en"]]
    assert value == pytest.approx(sacrebleu.corpus_chrf(answers, [[pair["en"] for pair in pairs]]).score)
    assert stderr > 0
    prompt = samples["translate_ru_en"][0]["arguments"][0][0]
    assert prompt.endswith("Переведи на английский: Открыть файл\nПеревод:")
    assert prompt.count("Перевод:") == 3
    assert "Open a file" not in prompt


@pytest.mark.parametrize("max_length", [150, 300])
def test_prompts_that_are_cut_are_counted(max_length, data_dir, mistral, t5):
    """Against lengths counted here. lm-eval says nothing of a T5's."""
    loaded = benchmark.load("xnli_ru", data_dir, 5)
    contexts = {context for context, _ in requests(loaded.tasks, limit=12)}
    for folder in (mistral, t5):
        with benchmark_models.opened(model_of(folder), None, 8, max_length) as model:
            benchmark.run(model, loaded, limit=12)
            longest = {context: 0 for context in contexts}
            for context, continuation in requests(loaded.tasks, limit=12):
                if model.backend == "seq2seq":
                    length = len(model.tokenizer(context.rstrip()).input_ids)
                else:  # the last token is predicted, not read
                    length = len(model.tokenizer(context + continuation).input_ids) - 1
                longest[context] = max(longest[context], length)
            assert model.prompts == len(contexts) == 12
            assert model.cut == sum(length > max_length for length in longest.values())
            assert model.cut > 0 or max_length == 300


# ---- what is taken up again ------------------------------------------------------------------------------------------


def test_an_equal_evaluation_is_not_computed_again(data_dir, t5, tmp_path, monkeypatch):
    models = [model_of(t5)]
    arguments = {"data_dir": data_dir, "output": tmp_path, "limit": 10}
    first = benchmark.benchmark(models, ["xnli_ru"], **arguments)
    loads = []
    opened = benchmark_models.opened

    def counted(*settings):
        loads.append(settings)
        return opened(*settings)

    monkeypatch.setattr(benchmark_models, "opened", counted)
    assert benchmark.benchmark(models, ["xnli_ru"], **arguments) == first
    assert not loads
    assert benchmark.benchmark(models, ["xnli_ru"], **{**arguments, "limit": 11})[0].items == 11
    assert len(loads) == 1
    rows = benchmark_sets.xnli(40, seed=5)
    other = benchmark_sets.write(tmp_path / "other", xnli_ru=rows)
    assert benchmark.benchmark(models, ["xnli_ru"], **{**arguments, "data_dir": other}) != first
    assert len(loads) == 2


def test_what_commands_write_below_a_model_is_no_part_of_it(t5, tmp_path):
    folder = shutil.copytree(t5, tmp_path / "model")
    before = model_of(folder).fingerprint
    (folder / "results").mkdir()
    (folder / "results" / "xnli_ru.json").write_text("{}")
    assert model_of(folder).fingerprint == before
    os.utime(folder / "model.safetensors", (0, 0))
    assert model_of(folder).fingerprint != before


def test_a_run_is_its_newest_checkpoint(tmp_path):
    found = []
    for step in ("1", "2"):
        checkpoint = benchmark_sets.tiny_t5(tmp_path / "run/checkpoints" / step, form="vikhr")
        assert model_of(tmp_path / "run") == model_of(checkpoint, "run")
        found.append(model_of(tmp_path / "run"))
    assert [model.path.name for model in found] == ["1", "2"]
    assert found[0].fingerprint != found[1].fingerprint


def test_a_fingerprint_does_not_depend_on_the_process(data_dir):
    for name in BENCHMARKS:
        for task in benchmark.load(name, data_dir, 0).tasks.values():
            assert " at 0x" not in json.dumps(benchmark._content(task))


def test_a_run_is_converted_for_the_evaluation(data_dir, t5, tmp_path):
    run = benchmark_sets.tiny_t5(tmp_path / "run", form="vikhr")
    models = [model_of(run), model_of(t5)]
    assert [model.is_run for model in models] == [True, False]
    ours, theirs = benchmark.benchmark(models, ["xnli_ru_seq2seq"], data_dir=data_dir, limit=20)
    assert (ours.value, ours.items) == (theirs.value, theirs.items)


# ---- the embedded texts ----------------------------------------------------------------------------------------------


def test_embedded_texts_are_as_many_as_the_tasks_hold_out():
    counts = {}
    for name in ("perplexity_ru", "perplexity_en", "translate_ru_en"):
        (task,) = benchmark.load(name).tasks.values()
        counts[name] = len(task.dataset["test"])
    assert counts["perplexity_ru"] == 80
    assert 60 < counts["perplexity_en"] < 140
    assert 600 < counts["translate_ru_en"] < 900


@pytest.mark.slow
def test_embedded_texts_are_those_that_the_demo_tasks_hold_out(tmp_path):
    """tasks.demo needs TensorFlow: in a process of its own it says which pages and pairs it validates on."""
    program = (
        "import json, sys, tasks.demo as d\n"
        "from vikhr_t5.data.sources import JsonLinesSource, TextSource, held_out\n"
        "pages = TextSource({'validation': d.PAGES}, belongs=held_out('text', d.HELD_OUT)).examples('validation')\n"
        "pairs = JsonLinesSource({'validation': d.PAIRS}, ['ru', 'en'], belongs=d.pair_belongs)\n"
        "pairs = pairs.examples('validation')\n"
        "found = [[p['text'].decode() for p in pages], [p['ru'].decode() for p in pairs]]\n"
        "json.dump(found, open(sys.argv[1], 'w'))\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "VIKHR_T5_VOCABULARY": str(root / "tests/reference/vocabulary/ru924.model")}
    command = [sys.executable, "-c", program, tmp_path / "found.json"]
    subprocess.run(command, check=True, cwd=root, env=environment)
    pages, pairs = json.loads((tmp_path / "found.json").read_text())
    (ru,), (parallel,) = (benchmark.load(name).tasks.values() for name in ("perplexity_ru", "translate_ru_en"))
    assert ru.dataset["test"]["text"] == pages
    assert parallel.dataset["test"]["ru"] == pairs


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusal(*arguments, **settings):
    with pytest.raises(UserError) as caught:
        benchmark.benchmark(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_that_cannot_be_measured(data_dir, t5, mistral, tmp_path):
    reason = refusal([model_of(mistral)], ["xnli_ru_seq2seq"], data_dir=data_dir)
    assert "for encoder-decoders" in reason
    reason = refusal([model_of(mistral)], ["translate_ru_en"], max_length=200, limit=1)
    assert "--max_length" in reason
    reason = refusal([model_of(mistral)], ["xnli_ru"], data_dir=data_dir, max_length=8)
    assert "--max_length" in reason
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in t5.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 900 if file.suffix == ".safetensors" else None])
    assert "cannot be loaded" in refusal([model_of(broken)], ["xnli_ru"], data_dir=data_dir)
    tiny_mistral.model(50).save_pretrained(tmp_path / "small")
    tiny_mistral.tokenizer(tiny_mistral.lines("ru", 100), 400).save_pretrained(tmp_path / "small")
    assert "and the model 50 rows" in refusal([model_of(tmp_path / "small")], ["xnli_ru"], data_dir=data_dir)


def test_folders_that_are_no_models(tmp_path, t5):
    def reason(source):
        with pytest.raises(UserError) as caught:
            benchmark_models.find_model(str(source))
        return str(caught.value)

    assert "hf download" in reason("Vikhrmodels/VikhrT5-3b")
    assert "no config.json" in reason(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "vikhr-mistral merge" in reason(tmp_path)
    for content, part in (("{", "cannot be read"), ('{"model_type": "vit"}', "neither an encoder-decoder")):
        folder = tmp_path / part
        folder.mkdir()
        (folder / "config.json").write_text(content)
        assert part in reason(folder)
    t5x = Path(__file__).parent / "reference/t511_d64/ckpt_legacy/checkpoint_200"
    assert "convert --from t5x" in reason(t5x)
    assert benchmark_models.find_model(f"ours={t5}").name == "ours"


def test_data_that_is_not_there(data_dir, tmp_path):
    def reason(name, folder, shots=None):
        with pytest.raises(UserError) as caught:
            benchmark.load(name, folder, shots)
        return str(caught.value)

    assert "no such folder" in reason("xnli_ru", tmp_path / "none")
    said = reason("xnli_ru", tmp_path)
    assert "put xnli_ru.jsonl there" in said
    assert "facebook/xnli/ru on the hub, split validation" in said
    benchmark_sets.write(tmp_path, xnli_ru=benchmark_sets.xnli(9), ru_mmlu=benchmark_sets.mmlu(1)[3:])
    assert "split train" in reason("xnli_ru", tmp_path, 5)
    assert "--num_fewshot 0" in reason("xnli_ru", tmp_path, 5)
    assert "subject abstract_algebra" in reason("ru_mmlu", tmp_path, 0)
    assert "5 rows, and 7 examples stand in a prompt: --num_fewshot 5" in reason("ru_mmlu", data_dir, 7)
    benchmark_sets.write(tmp_path, xwinograd_ru=benchmark_sets.xwinograd(3))
    assert "too few items" in reason("xwinograd_ru", tmp_path, 5)
    assert "nearest: xnli_ru" in reason("xnli", data_dir)
