"""What the tests of the tasks share: the tasks, registered with one small vocabulary, and a folder of published sets.

The tasks take their vocabulary from the environment when they are imported; the environment is as before afterwards.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import seqio
from own_variables import own_variables
from published import PAGES

from vikhr_t5.data.vocabulary import Vocabulary, train_vocabulary

REGISTRIES = (seqio.TaskRegistry, seqio.MixtureRegistry)
MODULES = ("corpora", "demo", "flan", "mixtures", "saiga", "templates")


@pytest.fixture(scope="session", autouse=True)
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """Of all tasks; only while they are imported it stands in the environment. They are imported anew where another
    test has done so with its own; what else is registered stays."""
    trained = train_vocabulary(PAGES[:200], tmp_path_factory.mktemp("vocabulary") / "ru.model", size=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIKHR_T5_VOCABULARY", trained.sentencepiece_model_file)
        patch.setenv("VIKHR_T5_EXTRA_IDS", str(trained.extra_ids))
        others = {registry: {name: registry.get(name) for name in registry.names()} for registry in REGISTRIES}
        for registry in REGISTRIES:
            registry.reset()
        for name in MODULES:
            sys.modules.pop(f"tasks.{name}", None)
        for name in MODULES:
            importlib.import_module(f"tasks.{name}")
    for registry, providers in others.items():
        for name in providers.keys() - registry.names():
            registry.add_provider(name, providers[name])
    return trained


@pytest.fixture(autouse=True)
def _no_variable_is_left() -> Iterator[None]:
    before = own_variables()
    yield
    assert own_variables() == before


@pytest.fixture(scope="session")
def corpora() -> ModuleType:
    return sys.modules["tasks.corpora"]


@pytest.fixture(scope="session")
def demo() -> ModuleType:
    return sys.modules["tasks.demo"]


@pytest.fixture(scope="session")
def flan() -> ModuleType:
    return sys.modules["tasks.flan"]


@pytest.fixture(scope="session")
def saiga() -> ModuleType:
    return sys.modules["tasks.saiga"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty VIKHR_T5_DATA_DIR."""
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(tmp_path))
    return tmp_path
