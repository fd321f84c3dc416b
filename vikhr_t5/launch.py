"""gin: files, search paths, overrides, the configuration's text. The only place that parses gin.

A launch is `load(files, bindings, search_paths)`, then `arguments(function)`: what gin binds to the function's
parameters, evaluated. Classes and functions become configurable by gin's dynamic registration, from the import lines
of the gin files; the code that is configured knows nothing of gin. What gin offers no way to ask for (its tables of
bindings and of registered names) is read from its module, `gin.config`.
"""

import difflib
import inspect
import os
import re
import sys
import tokenize
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import gin.config

from vikhr_t5 import t5x_dialect
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.gin_files import GinFiles, parameter_key, shown

ENTRIES = ("train", "evaluate", "infer")  # functions that commands call
_LOCATION = re.compile(r'\n  In (?:file "(?P<file>.*?)",|bindings string) line (?P<line>\d+)')
# What may stand on the command line without inner quotes: /a/b, ./a, ../a, ~/a, a/b, gs://a/b.
_PATH_VALUE = re.compile(r"^(?:(?:~|\.{1,2})?/|[A-Za-z_][\w.+-]*:?/)\S*$")


_reading = GinFiles([])
_filled_in: list[str] = []
# Ours alone: gin's own would take files past it, and logs an error for each file that another reader opens.
gin.config._FILE_READERS[:] = [(lambda name: _reading.read(name), os.path.isfile)]


def load(
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    dispensable: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Parse gin files in order, then the command line's `NAME=VALUE` bindings, and check that nothing is missing.

    Replaces whatever was loaded before. gin's configuration is locked afterwards.

    dispensable: macros whose gin value is this one where the files require one and nothing gives it.

    Raises:
        UserError: a file is missing or malformed, a name is unknown, a value is not a gin value, or a required
            macro has no value; says which file and line, or which flag.
    """
    global _reading
    _reading = GinFiles(search_paths)
    gin.config.clear_config()
    _forget_registered()
    for name in files:
        path = _reading.find(name)
        try:
            gin.config.parse_config_file(str(path))
        except Exception as error:
            _explain(error, shown(_reading.open_files[-1] if _reading.open_files else path))
    macros = _macros()
    for binding in bindings:
        _bind(binding, macros)
    _filled_in[:] = [
        name
        for name in dispensable
        if repr(gin.config._CONFIG.get((name, "gin.macro"), {}).get("value")) == "%gin.REQUIRED"
    ]
    for name in _filled_in:
        _bind(f"{name}={dispensable[name]}", macros)
    _give_task_modules()
    _check_complete()
    gin.config.finalize()


def filled_in() -> list[str]:
    """The dispensable macros that the last `load` gave their values."""
    return list(_filled_in)


def _forget_registered() -> None:
    """Drop what earlier loads registered: two modules of one name would make a short name ambiguous."""
    for selector, registered in list(gin.config._REGISTRY.items()):
        if registered.import_source is not None:
            gin.config._REGISTRY.pop(selector)
            gin.config._INVERSE_REGISTRY.pop(registered.wrapped, None)


def _give_task_modules() -> None:
    """A dataset whose `module` is None or not given gets the modules that the files import for their tasks."""
    modules = ",".join(dict.fromkeys(_reading.task_modules))
    for (scope, selector), values in list(gin.config._CONFIG.items()) if modules else ():
        if selector.endswith(".DatasetConfig") and _macro_value(values.get("module")) is None:
            gin.config.bind_parameter((scope, selector, "module"), modules)


def _macro_value(value: Any) -> Any:
    """The value of a reference to a macro; any other value as it is."""
    while isinstance(value, gin.config.ConfigurableReference) and repr(value).startswith("%"):
        value = gin.config._CONFIG.get(value.config_key, {}).get("value")
    return value


def arguments(function: Callable[..., Any], supplied: Sequence[str] = ()) -> dict[str, Any]:
    """What the loaded gin files bind to `function`'s parameters, references evaluated.

    Where they bind t5x's function of the same purpose instead, its adapter (whose `stands_for` is `function`)
    translates.

    Args:
        function: is called by the caller, with these arguments and a few of its own.
        supplied: the names of those few.

    Raises:
        UserError: the files do not configure the function, leave one of its parameters without a value, or bind what
            cannot be had; says where.
    """
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    bound = {selector for _, selector in gin.config._CONFIG}
    found = [
        c
        for c in _registered()
        if c.selector in bound and function in (c.wrapped, getattr(c.wrapped, "stands_for", None))
    ]
    if not found:
        runs = {"train": "'runs/pretrain.gin' or 'runs/finetune.gin'"}
        run = runs.get(function.__name__, f"'runs/{name.split('.')[0]}.gin'")
        raise UserError(f"no gin file binds {name}: include {run}")
    if len(found) > 1:
        names = " and ".join(_short(c.selector) for c in found)
        raise UserError(f"the gin files bind both {names}: include a run file of one kind, ours or t5x's")
    (configurable,) = found
    wrapped = configurable.wrapped
    try:
        values = gin.config.get_bindings(configurable.selector)
        missing = [
            p.name
            for p in inspect.signature(wrapped).parameters.values()
            if p.default is p.empty and p.name not in (*values, *supplied)
        ]
        if missing:
            name = _short(configurable.selector)
            raise UserError(f"{name} needs {', '.join(missing)}: bind {', '.join(f'{name}.{m}' for m in missing)}")
        translated = values if wrapped is function else wrapped(**values)
    except (TypeError, ValueError) as error:  # a constructor refused what is bound to it
        raise UserError(_refused(error)) from error
    except UserError as error:
        binding = getattr(error, "binding", None)
        if binding is None:
            raise
        place = _reading.place(binding)
        message = str(error).split("\n")[0]
        raise UserError(f"{place}: {message}" if place else message) from error
    # gin's operative configuration records what is called through gin. The function is called by us: record it here.
    defaults = gin.config._get_default_configurable_parameter_values(wrapped, None, supplied)
    operative = defaults | gin.config.get_bindings(configurable.selector, resolve_references=False)
    gin.config._OPERATIVE_CONFIG[("", configurable.selector)] = operative
    _check_names_meet()
    return translated


def _registered() -> list[gin.config.Configurable]:
    return [c for _, c in gin.config._REGISTRY.items() if c.import_source is not None]


def _check_names_meet() -> None:
    """UserError where t5x's name of a thing is bound, and the run is made with ours, or the other way round."""
    bound = {selector for _, selector in gin.config._CONFIG}
    used = {selector for _, selector in gin.config._OPERATIVE_CONFIG}
    for c in [] if _has_another_run() else _registered():
        twin = gin.config._inverse_lookup(getattr(c.wrapped, "stands_for", None) or c.wrapped)
        if twin is None or twin is c:
            continue
        for idle, busy in ((c.selector, twin.selector), (twin.selector, c.selector)):
            if idle in bound and idle not in used and busy in used:
                raise UserError(
                    f"{_short(idle)} is bound and has no effect, since the run files make {_short(busy)}: bind that,"
                    " or include run files of one kind ('t5x/configs/runs/pretrain.gin' has t5x's names,"
                    " 'runs/pretrain.gin' ours)"
                )


def _has_another_run() -> bool:
    """Whether the files bind another command, too: the configuration of the run that is evaluated."""
    idle = {selector for _, selector in gin.config._CONFIG} - {selector for _, selector in gin.config._OPERATIVE_CONFIG}
    return any(c.selector in idle and c.wrapped.__name__ in ENTRIES for c in _registered())


def idle() -> list[str]:
    """Of t5x's names, those that are bound and that nothing in this launch uses, in their scopes."""
    if _has_another_run():
        return []
    used = gin.config._OPERATIVE_CONFIG
    macros = _macros()

    def is_used(scope: str, selector: str) -> bool:
        for used_scope, used_selector in used:
            plain = "/".join(name for name in used_scope.split("/") if name not in macros)
            if selector == used_selector and (not scope or f"{plain}/".startswith(f"{scope}/")):
                return True
        return False

    return [
        f"{scope}{'/' if scope else ''}{_short(selector)}"
        for scope, selector in gin.config._CONFIG
        if t5x_dialect.__name__ in selector and not is_used(scope, selector)
    ]


def config_text() -> str:
    """The operative configuration: every value that `arguments` used, defaults too, as one gin file.

    Loading it gives the same arguments, whatever becomes of the defaults.
    """
    # gin evaluates a macro in a scope of the macro's name, and records what the macro builds under that scope
    # (MODEL/network.T5Config): a binding of network.T5Config over the file would then silently do nothing.
    macros, operative = _macros(), dict[tuple[str, str], dict[str, Any]]()
    for (scope, selector), values in gin.config._OPERATIVE_CONFIG.items():
        if selector != "gin.macro":
            scope = "/".join(name for name in scope.split("/") if name not in macros)
        operative.setdefault((scope, selector), {}).update(values)
    return t5x_dialect.restore_imports(gin.config._config_str(operative, max_line_length=120))


def _macros() -> set[str]:
    """Names of the macros that the loaded files set or use."""
    bound = {scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"}
    return bound | {repr(r)[1:] for r in gin.config.iterate_references(gin.config._CONFIG) if repr(r).startswith("%")}


def _bind(binding: str, macros: set[str]) -> None:
    """One `NAME=VALUE` of the command line. A path may stand without inner quotes; any other string needs them."""
    name, equals, value = binding.partition("=")
    flag, name = f"--gin.{binding}", t5x_dialect.command_line_name(name.strip())
    if not equals or not value.strip():
        raise UserError(f"{flag}: write --gin.NAME=VALUE")
    if "." not in name and name not in macros:
        raise UserError(f"{flag}: unknown macro {name} ({nearest(name, macros - {'gin.REQUIRED'})})")
    if _PATH_VALUE.match(value):
        value = repr(os.path.expanduser(value))
    try:
        gin.config.parse_config([*_import_lines(name, value), f"{name} = {value}"])
        _reading.flags[parameter_key(name)] = flag
    except (SyntaxError, tokenize.TokenError):
        python = {"true": "True", "false": "False", "none": "None"}.get(value.lower())
        instead = f"--gin.{name}={python}" if python else f"""--gin.{name}="'{value}'" where a string is meant"""
        raise UserError(f"{flag}: the value is not a gin (Python) value; write {instead}") from None
    except Exception as error:
        _explain(error, flag)


def _import_lines(name: str, value: str) -> list[str]:
    """Import lines for a binding whose value refers to what no file has named yet (@optimizers.AdamW() beside
    Adafactor): gin looks for it in a module only where that is imported."""
    registered = {f"{c.selector.split('.')[-2]}.{c.name}": c.selector.rpartition(".")[0] for c in _registered()}
    modules = {short.split(".")[0]: module for short, module in registered.items()}
    references = re.findall(r"@(?:\w+/)*(\w+\.\w+)", value)
    if all(reference in registered or reference.split(".")[0] not in modules for reference in references):
        return []
    named = {word.split(".")[0] for word in [*references, name.rpartition("/")[2]]}
    imports = [module.rpartition(".") for short, module in modules.items() if short in named]
    return [
        "from __gin__ import dynamic_registration",
        *(f"from {package} import {last}" for package, _, last in imports),
    ]


def _check_complete() -> None:
    """No macro that must be given, or that is used, is left without a value."""
    config = gin.config._CONFIG
    required = [
        scope if selector == "gin.macro" else f"{scope}{'/' if scope else ''}{_short(selector)}.{parameter}"
        for (scope, selector), values in config.items()
        for parameter, value in values.items()
        if repr(value) == "%gin.REQUIRED"
    ]
    if required:
        flags = " ".join(f"--gin.{name}=…" for name in required)
        raise UserError(f"required by the gin files and not given: {', '.join(required)}; add {flags}")
    for reference in gin.config.iterate_references(config):
        name = repr(reference)[1:]
        if repr(reference).startswith("%") and name != "gin.REQUIRED" and reference.config_key not in config:
            hint = "include a file of models/, or " if name == "MODEL" else ""
            raise UserError(f"macro {name} is used and never set: {hint}add --gin.{name}=…")


def _short(selector: str) -> str:
    return ".".join(selector.split(".")[-2:])


def _explain(error: Exception, source: str) -> NoReturn:
    """Turn what gin raised while parsing `source` (a file, or a flag) into one line with the place and a way out."""
    text = str(error)
    message = text.split("\n")[0]
    located = _LOCATION.search(text)
    place = f"{shown(located['file'])}:{located['line']}" if located and located["file"] else source
    if isinstance(error, UserError):
        # One of ours knows its place already, unless it came out of a name that gin looked up.
        raise UserError(f"{place}: {message}" if located and not re.match(r"\S+:\d+: ", message) else message) from None
    if isinstance(error, SyntaxError):
        place = f"{shown(error.filename)}:{error.lineno}" if error.filename else source
        raise UserError(f"{place}: gin syntax error: {(error.msg or '').splitlines()[0].rstrip('.')}") from None
    if isinstance(error, tokenize.TokenError):
        line = error.args[1][0]
        raise UserError(f"{place}:{line}: gin syntax error: {error.args[0]} (an unclosed bracket?)") from None
    raise UserError(f"{place}: {_reword(error, message)}") from None


def _reword(error: Exception, message: str) -> str:
    """gin's message about a name, with the nearest names that would do."""
    if match := re.match(r"Configurable '(.+)' doesn't have a parameter named '(.+)'", message):
        selector, parameter = match.groups()
        wrapped = [gin.config._REGISTRY[full].wrapped for full in gin.config._REGISTRY.matching_selectors(selector)]
        signatures = [inspect.signature(inspect.unwrap(one)).parameters for one in wrapped]
        known = [name for names in signatures if parameter not in names for name in names]
        return f"{selector} has no parameter {parameter} ({nearest(parameter, known)})"
    if match := re.match(
        r"No configurable matching (?:reference )?'@?(.+?)(?:\(\))?'|'(.+)' was not provided by an import", message
    ):
        if match[2]:
            return f"{match[2]!r} is not imported by this file: add its import line (`from package import {match[2]}`)"
        return f"unknown configurable {match[1]} ({_nearest_selector(match[1])})"
    if match := re.match(r"Couldn't resolve selector (.+?); <module '(.+?)'.* has no attribute (\w+)", message):
        names = [name for name in vars(sys.modules[match[2]]) if not name.startswith("_")]
        return f"{match[1]}: the module {match[2]} has no {match[3]} ({nearest(match[3], names)})"
    if isinstance(error, ImportError):
        return f"cannot import: {message}"
    return message


def _refused(error: Exception) -> str:
    """What a configurable raised when it was called with its bindings; gin has appended which one it was."""
    message, *calls = str(error).split("\n  In call to configurable ")
    where = re.match(r"'(.+?)'", calls[0]) if calls else None
    return (f"the bindings of {where[1]} do not suit it: " if where else "") + message.split("\n")[0]


def _nearest_selector(selector: str) -> str:
    known = {_short(s) for s, _ in gin.config._REGISTRY.items() if not s.startswith("gin.")}
    last = {s.rpartition(".")[2]: s for s in known}
    close = difflib.get_close_matches(selector.rpartition(".")[2], last, n=3, cutoff=0.5)
    return "nearest: " + ", ".join(last[c] for c in close) if close else nearest(selector, known)
