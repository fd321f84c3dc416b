"""t5x's module names → ours: the only place that knows them.

A gin file written for t5x imports `t5x.utils`, `seqio`, `__main__`. launch.py passes every import line that it reads
through `rewrite_import`, which replaces a module of the table by a stand-in of the same name under this module
(`from t5x import utils` → `from vikhr_t5.t5x_dialect.t5x import utils`). A stand-in resolves its names through the
table when gin asks for them, so nothing of t5x or seqio needs to be installed, and nothing of ours is imported early.
"""

import importlib
import re
import sys
import types
from typing import Any

from vikhr_t5.errors import UserError, nearest
from vikhr_t5.packages import require_own

TABLE: dict[str, dict[str, str]] = {
    "__main__": {"train": "vikhr_t5.train.loop:train"},
    "seqio": {"SentencePieceVocabulary": "vikhr_t5.data.vocabulary:Vocabulary"},
    "t5x.adafactor": {"Adafactor": "vikhr_t5.train.optimizers:Adafactor"},
    "t5x.examples.t5.network": {
        "T5Config": "vikhr_t5.model.network:T5Config",
        "Transformer": "vikhr_t5.model.network:Transformer",
    },
    "t5x.models": {"EncoderDecoderModel": "vikhr_t5.train.state:EncoderDecoderModel"},
    "t5x.partitioning": {"PjitPartitioner": "vikhr_t5.train.partitioning:Partitioner"},
    "t5x.train": {"train": "vikhr_t5.train.loop:train"},
    "t5x.trainer": {"Trainer": "vikhr_t5.train.step:Trainer"},
    "t5x.utils": {
        "CheckpointConfig": "vikhr_t5.train.checkpoints:CheckpointConfig",
        "DatasetConfig": "vikhr_t5.data.pipeline:DatasetConfig",
        "RestoreCheckpointConfig": "vikhr_t5.train.checkpoints:RestoreCheckpointConfig",
        "SaveCheckpointConfig": "vikhr_t5.train.checkpoints:SaveCheckpointConfig",
        "create_learning_rate_scheduler": "vikhr_t5.train.optimizers:create_learning_rate_scheduler",
    },
}

_IMPORT = re.compile(
    r"^(?P<indent>\s*)(?:from\s+(?P<package>[\w.]+)\s+import\s+(?P<name>\w+)|import\s+(?P<module>[\w.]+))"
    r"(?:\s+as\s+(?P<alias>\w+))?(?P<rest>\s*(?:#.*)?)$"
)


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
                f"{child} is t5x's and has no counterpart in vikhr-t5 ({nearest(attribute, names)}): "
                "remove the lines that use it"
            )
        module, name = names[attribute].split(":")
        return getattr(importlib.import_module(module), name)


def _packages(module: str) -> list[str]:
    """`t5x.examples.t5.network` → [`t5x`, `t5x.examples`, `t5x.examples.t5`, `t5x.examples.t5.network`]."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


# gin imports by name (`__import__`), which finds what is already in sys.modules.
for _module in TABLE:
    for _package in _packages(_module):
        sys.modules.setdefault(f"{__name__}.{_package}", _StandIn(_package))


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
    if module not in TABLE:
        require_own(module)  # here, since Python would take a submodule of ours from an editable install all the same
        if top == "t5x" or module.startswith("seqio."):
            raise UserError(f"vikhr-t5 has no counterpart of t5x's module {module} ({nearest(module, TABLE)})")
        return line
    end = match["rest"] + line[len(line.rstrip("\n")) :]
    if match["module"] and not match["alias"]:  # `import seqio` binds the first part of the name
        return f"{match['indent']}import {__name__}.{top} as {top}{end}"
    alias = f" as {match['alias']}" if match["alias"] else ""
    if match["module"]:
        return f"{match['indent']}import {__name__}.{module}{alias}{end}"
    return f"{match['indent']}from {__name__}.{match['package']} import {match['name']}{alias}{end}"
