"""The import rules of the design, read from the source, and what a training process really loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TENSORFLOW = ("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "t5", "apache_beam")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
TORCH = ("torch", "transformers", "accelerate", "peft")
SHARED = tuple(
    f"vikhr_t5.{name}"
    for name in (
        *("__version__", "devices", "errors", "files", "fingerprint", "outputs", "packages", "page", "progress"),
        "remote",
        "text_metrics",
    )
)

# Who may import what of ours, besides SHARED. A folder's rule holds for its files unless a file has its own.
ALLOWED: dict[str, tuple[str, ...]] = {
    "vikhr_t5/data": ("vikhr_t5.data",),
    "vikhr_t5/model": ("vikhr_t5.model",),
    "vikhr_t5/train": ("vikhr_t5.train", "vikhr_t5.model", "vikhr_t5.data", "vikhr_t5.hosts"),
    "vikhr_t5/hosts.py": ("vikhr_t5.command_line",),
    "vikhr_t5/launch.py": ("vikhr_t5.t5x_dialect", "vikhr_t5.gin_files"),
    "vikhr_t5/gin_files.py": ("vikhr_t5.t5x_dialect",),
    "vikhr_t5/t5x_refusals.py": (),
    "vikhr_t5/t5x_adapters.py": ("vikhr_t5.t5x_refusals", "vikhr_t5.data", "vikhr_t5.model", "vikhr_t5.train"),
    "vikhr_t5/t5x_scripts.py": (
        "vikhr_t5.t5x_adapters",
        "vikhr_t5.t5x_refusals",
        "vikhr_t5.data",
        "vikhr_t5.eval",
        "vikhr_t5.infer",
        "vikhr_t5.train",
    ),
    "vikhr_t5/__init__.py": ("vikhr_t5.api",),
    "vikhr_t5/inference.py": ("vikhr_t5.train", "vikhr_t5.model", "vikhr_t5.data"),
    "vikhr_t5/task_examples.py": ("vikhr_t5.data",),
    "vikhr_t5/prompts.py": ("vikhr_t5.data",),
    # What a person calls to use a model of any format: it reads with the converters, so it stands above them.
    "vikhr_t5/api.py": (
        "vikhr_t5.inference",
        "vikhr_t5.prompts",
        "vikhr_t5.train",
        "vikhr_t5.model",
        "vikhr_t5.data",
        "conversion",
    ),
    "vikhr_t5/infer_files.py": (
        "vikhr_t5.api",
        "vikhr_t5.inference",
        "vikhr_t5.prompts",
        "vikhr_t5.resumable",
        "vikhr_t5.data",
    ),
    "vikhr_t5/cli_infer.py": ("vikhr_t5.api", "vikhr_t5.cli_gin", "vikhr_t5.infer", "vikhr_t5.infer_files"),
    "vikhr_t5/eval.py": ("vikhr_t5.inference", "vikhr_t5.task_examples", "vikhr_t5.train", "vikhr_t5.data"),
    "vikhr_t5/infer.py": ("vikhr_t5.inference", "vikhr_t5.task_examples", "vikhr_t5.train", "vikhr_t5.data"),
    "vikhr_t5/t5x_dialect.py": (),
    "vikhr_t5/playground.py": ("vikhr_t5.api", "vikhr_t5.playground_chat", "vikhr_t5.playground_t5"),
    "vikhr_t5/playground_chat.py": ("vikhr_mistral.chat",),
    "vikhr_t5/playground_t5.py": ("vikhr_t5.api", "vikhr_t5.prompts"),
    "vikhr_t5/cli_playground.py": ("vikhr_t5.command_line", "vikhr_t5.playground"),
    "vikhr_t5/report.py": ("vikhr_t5.report_charts", "vikhr_t5.run_folder"),
    "vikhr_t5/report_charts.py": ("vikhr_t5.run_folder",),
    "vikhr_t5/translate.py": ("vikhr_t5.translation_text",),
    "vikhr_t5/dry_run.py": ("vikhr_t5.plan_memory", "vikhr_t5.train", "vikhr_t5.model", "vikhr_t5.data"),
    "vikhr_t5/plan.py": ("vikhr_t5.plan_compile", "vikhr_t5.plan_memory", "vikhr_t5.train"),
    "vikhr_t5/plan_chart.py": ("vikhr_t5.dry_run", "vikhr_t5.plan_report"),
    "vikhr_t5/plan_compile.py": ("vikhr_t5.data", "vikhr_t5.train"),
    "vikhr_t5/plan_flops.py": ("vikhr_t5.model",),
    "vikhr_t5/plan_memory.py": ("vikhr_t5.plan_flops", "vikhr_t5.data", "vikhr_t5.model", "vikhr_t5.train"),
    "vikhr_t5/plan_report.py": ("vikhr_t5.dry_run", "vikhr_t5.plan", "vikhr_t5.plan_time", "vikhr_t5.train"),
    "vikhr_t5/plan_time.py": (),
    "vikhr_t5/cli.py": (
        "vikhr_t5.cli_benchmark",
        "vikhr_t5.cli_data",
        "vikhr_t5.cli_gin",
        "vikhr_t5.cli_infer",
        "vikhr_t5.cli_plan",
        "vikhr_t5.cli_playground",
        "vikhr_t5.cli_vocab",
        "vikhr_t5.command_line",
        "vikhr_t5.data",
        "vikhr_t5.dry_run",
        "vikhr_t5.eval",
        "vikhr_t5.hosts",
        "vikhr_t5.report",
        "vikhr_t5.train",
        "conversion",
    ),
    "vikhr_t5/cli_gin.py": ("vikhr_t5.command_line", "vikhr_t5.launch", "vikhr_t5.train", "conversion"),
    "vikhr_t5/cli_plan.py": (
        "vikhr_t5.cli_gin",
        "vikhr_t5.launch",
        "vikhr_t5.plan",
        "vikhr_t5.plan_chart",
        "vikhr_t5.plan_compile",
        "vikhr_t5.plan_report",
        "vikhr_t5.train",
    ),
    "vikhr_t5/cli_data.py": (
        "vikhr_t5.command_line",
        "vikhr_t5.data",
        "vikhr_t5.translate",
        "vikhr_t5.translation_models",
    ),
    "vikhr_t5/benchmark.py": (
        "vikhr_t5.benchmark_data",
        "vikhr_t5.benchmark_models",
        "vikhr_t5.benchmark_results",
        "tasks",
    ),
    "vikhr_t5/benchmark_data.py": ("vikhr_t5.data",),
    "vikhr_t5/benchmark_models.py": ("conversion",),
    "vikhr_t5/benchmark_results.py": (),
    "vikhr_t5/benchmark_table.py": ("vikhr_t5.benchmark_results",),
    "vikhr_t5/cli_benchmark.py": (
        "vikhr_t5.benchmark",
        "vikhr_t5.benchmark_models",
        "vikhr_t5.benchmark_results",
        "vikhr_t5.benchmark_table",
        "vikhr_t5.cli_data",
        "vikhr_t5.command_line",
    ),
    "vikhr_t5/cli_vocab.py": ("vikhr_t5.cli_data", "vikhr_t5.command_line", "vikhr_t5.data", "conversion"),
    "vikhr_t5": (),
    "tasks": ("tasks", "vikhr_t5.data"),
    "conversion": (
        "conversion",
        "vikhr_t5.model",
        "vikhr_t5.train.checkpoint_files",
        "vikhr_t5.train.checkpoints",
        "vikhr_t5.data.vocabulary",
    ),
    "vikhr_mistral/cli.py": ("vikhr_mistral", "vikhr_t5.command_line"),
    "vikhr_mistral": (
        "vikhr_mistral",
        "vikhr_t5.data",
        "conversion.charsmap",
        "conversion.safetensors",
        "conversion.tokenizer_json",
        "conversion.weights",
    ),
}
# Third-party packages that only these files may import.
RESERVED: dict[tuple[str, ...], tuple[str, ...]] = {
    TENSORFLOW: (
        "tasks",
        "vikhr_t5/data/sources.py",
        "vikhr_t5/data/seqio_tasks.py",
        "vikhr_t5/data/cache_beam.py",
        "vikhr_t5/eval.py",
    ),
    TORCH: (
        "vikhr_mistral",
        "conversion/verify.py",
        "conversion/weights.py",
        "vikhr_t5/benchmark.py",
        "vikhr_t5/benchmark_models.py",
        "vikhr_t5/translation_models.py",
    ),
    ("lm_eval",): ("vikhr_t5/benchmark.py", "vikhr_t5/benchmark_models.py"),
    ("gin",): ("vikhr_t5/launch.py", "vikhr_t5/t5x_dialect.py"),
}
FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("vikhr_t5", "tasks", "conversion", "vikhr_mistral")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(file: str) -> Iterator[str]:
    """Full dotted names: `from a.b import c` gives a.b.c."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            else:
                yield from visit(child)

    return visit(ast.parse((ROOT / file).read_text(encoding="utf-8")))


def within(name: str, prefixes: tuple[str, ...], separator: str = ".") -> bool:
    return any(name == prefix or name.startswith(prefix + separator) for prefix in prefixes)


def test_there_is_something_to_check():
    assert "vikhr_t5/train/loop.py" in FILES
    assert "vikhr_t5.errors.UserError" in set(imports("vikhr_t5/launch.py"))


@pytest.mark.parametrize("file", FILES)
def test_what_a_file_imports_of_ours(file):
    rule = max((rule for rule in ALLOWED if within(file, (rule,), "/")), key=len)
    ours = {name for name in imports(file) if within(name, ("vikhr_t5", "tasks", "conversion", "vikhr_mistral"))}
    assert not [name for name in ours - {"vikhr_t5"} if not within(name, (*ALLOWED[rule], *SHARED))]


@pytest.mark.parametrize("file", FILES)
def test_where_heavy_packages_are_imported(file):
    for packages, places in RESERVED.items():
        if not within(file, places, "/"):
            assert not [name for name in imports(file) if within(name, packages)]
    if within(file, ("vikhr_t5/data", "tasks", "vikhr_mistral"), "/"):
        assert not [name for name in imports(file) if within(name, JAX)]


def test_gin_folder_is_no_package():
    """An `__init__.py` there would hide the gin-config package."""
    assert not list((ROOT / "gin").rglob("__init__.py"))


def loaded_by(code: str) -> set[str]:
    """Top-level packages in sys.modules after `code`, in a process of its own."""
    program = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_training_path_loads_neither_tensorflow_nor_torch():
    modules = ["cli", "launch", "dry_run", "train.loop", "data.pipeline", "data.store", "t5x_scripts", "eval", "infer"]
    loaded = loaded_by("\n".join(f"import vikhr_t5.{module}" for module in modules))
    assert {"jax", "gin", "numpy"} <= loaded
    assert not loaded & {*TENSORFLOW, *TORCH}


def test_the_command_line_is_light():
    """`--help` is instant: nothing heavy before a command runs."""
    assert not loaded_by("import vikhr_t5.cli") & {*TENSORFLOW, *TORCH, *JAX, "numpy", "gin", "rich"}
