"""t5x's module names → ours: the only place that knows them.

A gin file written for t5x imports `t5x.utils`, `seqio`, `__main__`. launch.py passes every import line that it reads
through `rewrite_import`, which replaces a module of the table by a stand-in of the same name under this module
(`from t5x import utils` → `from vikhr_t5.t5x_dialect.t5x import utils`). A stand-in resolves its names through the
table when gin asks for them, so nothing of t5x or seqio needs to be installed, and nothing of ours is imported early.

A name whose arguments and defaults are those of t5x stands for our own object; any other for an adapter of
t5x_adapters.py or t5x_scripts.py, which takes t5x's arguments.
"""

import importlib
import re
import sys
import types
from typing import Any

from vikhr_t5.errors import UserError, nearest
from vikhr_t5.packages import require_own

ADAPTERS, SCRIPTS = "vikhr_t5.t5x_adapters", "vikhr_t5.t5x_scripts"
_SCRIPT = {name: f"{SCRIPTS}:{name}" for name in ("train", "evaluate", "infer")}

TABLE: dict[str, dict[str, str]] = {
    "__main__": _SCRIPT,
    "seqio": {
        "ByteVocabulary": f"{ADAPTERS}:ByteVocabulary",
        "Evaluator": f"{SCRIPTS}:Evaluator",
        "JSONLogger": f"{SCRIPTS}:JSONLogger",
        "PyLoggingLogger": f"{SCRIPTS}:PyLoggingLogger",
        "SentencePieceVocabulary": f"{ADAPTERS}:SentencePieceVocabulary",
        "TensorBoardLogger": f"{SCRIPTS}:TensorBoardLogger",
    },
    # Only what treats each number of a tensor alone: our tensors are stacks of layers.
    "optax": {
        name: f"optax:{name}"
        for name in (
            *("adam", "adamw", "lion", "sgd", "rmsprop", "clip", "clip_by_global_norm", "add_decayed_weights"),
            *("constant_schedule", "cosine_decay_schedule", "exponential_decay", "join_schedules", "linear_schedule"),
            "warmup_cosine_decay_schedule",
        )
    },
    "t5x.adafactor": {
        "Adafactor": f"{ADAPTERS}:Adafactor",
        "standard_logical_factor_rules": f"{ADAPTERS}:standard_logical_factor_rules",
    },
    "t5x.eval": {"evaluate": f"{SCRIPTS}:evaluate"},
    "t5x.examples.scalable_t5.network": {
        "T5Config": f"{ADAPTERS}:ScalableT5Config",
        "Transformer": "vikhr_t5.model.network:Transformer",
    },
    "t5x.examples.t5.network": {
        "T5Config": "vikhr_t5.model.network:T5Config",
        "Transformer": "vikhr_t5.model.network:Transformer",
    },
    "t5x.gin_utils": {"summarize_gin_config": f"{SCRIPTS}:summarize_gin_config"},
    "t5x.infer": {"infer": f"{SCRIPTS}:infer"},
    "t5x.models": {"EncoderDecoderModel": f"{ADAPTERS}:EncoderDecoderModel"},
    "t5x.optimizers": {name: f"{ADAPTERS}:{name}" for name in ("adam", "adamw", "chain", "lion", "rmsprop", "sgd")},
    "t5x.partitioning": {
        "PjitPartitioner": f"{ADAPTERS}:PjitPartitioner",
        "standard_logical_axis_rules": f"{ADAPTERS}:standard_logical_axis_rules",
    },
    "t5x.train": {"train": f"{SCRIPTS}:train"},
    "t5x.trainer": {
        "TerminateOnNanAction": f"{ADAPTERS}:TerminateOnNanAction",
        "Trainer": f"{ADAPTERS}:Trainer",
    },
    "t5x.utils": {
        "CheckpointConfig": f"{ADAPTERS}:CheckpointConfig",
        "DatasetConfig": f"{ADAPTERS}:DatasetConfig",
        "RestoreCheckpointConfig": f"{ADAPTERS}:RestoreCheckpointConfig",
        "SaveCheckpointConfig": f"{ADAPTERS}:SaveCheckpointConfig",
        "create_learning_rate_scheduler": "vikhr_t5.train.optimizers:create_learning_rate_scheduler",
        "get_dataset": f"{SCRIPTS}:get_dataset",
        "get_training_eval_datasets": f"{SCRIPTS}:get_training_eval_datasets",
        "verify_matching_vocabs": f"{SCRIPTS}:verify_matching_vocabs",
    },
}

# What to use instead of what people may well ask for.
INSTEAD = {
    "optax": "only what treats each number alone can be used, since our tensors are stacks of layers",
    "t5x.checkpoints": "for the best checkpoint set checkpoints.SaveCheckpointConfig.best_metric of vikhr_t5.train",
    "t5x.decoding": "decoding is greedy: remove the lines that use it",
    "t5x.models.DecoderOnlyModel": "only encoder-decoders are trained",
    "t5x.trainer.EarlyStoppingAction": "keep the best checkpoint with vikhr_t5's SaveCheckpointConfig.best_metric",
}

_IMPORT = re.compile(
    r"^(?P<indent>\s*)(?:from\s+(?P<package>[\w.]+)\s+import\s+(?P<name>\w+)|import\s+(?P<module>[\w.]+))"
    r"(?:\s+as\s+(?P<alias>\w+))?(?P<rest>\s*(?:#.*)?)$"
)
_SCRIPT_NAME = re.compile(r"(?<![\w.])(?:train|eval|infer)_script\.(?=\w)")


class _StandIn(types.ModuleType):
    """A module, or a package of modules, of t5x as gin sees it: its attributes are the table's objects of ours."""

    def __init__(self, t5x_name: str):
        super().__init__(f"{__name__}.{t5x_name}", f"Stands for t5x's `{t5x_name}`.")
        self._t5x_name = t5x_name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # Python's own look-ups: __path__, __wrapped__, …
            raise AttributeError(attribute)
        child = f"{self._t5x_name}.{attribute}"
        if f"{__name__}.{child}" in sys.modules:
            return sys.modules[f"{__name__}.{child}"]
        names = TABLE.get(self._t5x_name, {})
        if attribute not in names:
            raise UserError(
                f"{child} is {'optax' if self._t5x_name == 'optax' else 't5x'}'s and has no counterpart in vikhr-t5"
                f" ({nearest(attribute, names)}): {_instead(child)}"
            )
        module, name = names[attribute].split(":")
        return getattr(importlib.import_module(module), name)


def _instead(name: str) -> str:
    return next(
        (INSTEAD[part] for part in reversed(_packages(name)) if part in INSTEAD), "remove the lines that use it"
    )


def _packages(module: str) -> list[str]:
    """`t5x.examples.t5.network` → [`t5x`, `t5x.examples`, `t5x.examples.t5`, `t5x.examples.t5.network`]."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


# gin imports by name (`__import__`), which finds what is already in sys.modules.
_STAND_INS = {package for module in TABLE for package in _packages(module)}
for _package in _STAND_INS:
    sys.modules.setdefault(f"{__name__}.{_package}", _StandIn(_package))


def imported(line: str) -> tuple[str, str] | None:
    """(module, the name that the file knows it by) of an import line of a module that is not of the table."""
    match = _IMPORT.match(line.rstrip("\n"))
    if not match or match["package"] == "__gin__":
        return None
    module = match["module"] or f"{match['package']}.{match['name']}"
    if module in _STAND_INS or module.split(".")[0] in ("t5x", "vikhr_t5"):
        return None
    return module, match["alias"] or match["name"] or module.split(".")[0]


def rewrite_import(line: str) -> str:
    """An import line of a gin file with a module of the table replaced by its stand-in; any other line unchanged.

    The name that the file knows the module by stays the same. Raises UserError for a module of t5x that the table
    lacks: importing the real one would start a second trainer's code inside ours.
    """
    match = _IMPORT.match(line.rstrip("\n"))
    if not match:
        return line
    module = match["module"] or f"{match['package']}.{match['name']}"
    top = module.split(".")[0]
    if module not in _STAND_INS:
        require_own(module)  # here, since Python would take a submodule of ours from an editable install all the same
        if top == "t5x" or module.startswith(("seqio.", "optax.")):
            raise UserError(
                f"vikhr-t5 has no counterpart of t5x's module {module} ({nearest(module, TABLE)}): {_instead(module)}"
            )
        return line
    end = match["rest"] + line[len(line.rstrip("\n")) :]
    if match["module"] and not match["alias"]:  # `import seqio` binds the first part of the name
        return f"{match['indent']}import {__name__}.{top} as {top}{end}"
    alias = f" as {match['alias']}" if match["alias"] else ""
    if match["module"]:
        return f"{match['indent']}import {__name__}.{module}{alias}{end}"
    return f"{match['indent']}from {__name__}.{match['package']} import {match['name']}{alias}{end}"


def restore_imports(text: str) -> str:
    """The inverse of `rewrite_import`, for every line of a configuration's text."""
    text = re.sub(rf"^(import|from) {re.escape(__name__)}\.", r"\1 ", text, flags=re.MULTILINE)
    return re.sub(r"^import (\w+) as \1$", r"import \1", text, flags=re.MULTILINE)


def command_line_name(name: str) -> str:
    """`train_script.train.eval_period` → `train.eval_period`: on the command line gin knows no file's aliases."""
    return _SCRIPT_NAME.sub("", name)
