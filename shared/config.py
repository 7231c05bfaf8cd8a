"""YAML and dotted overrides -> strict, typed dataclasses; how a command begins and ends.

Reads, checks, writes, explains and compares a schema of any keys; every mistake is one line, exit code 2.
Standard library and OmegaConf only, so that a wrong recipe is answered before torch is imported.
"""

import argparse
import atexit
import dataclasses
import errno
import keyword
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shared import __version__

NO_RIGHTS = {errno.EROFS, errno.EACCES}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO} | NO_RIGHTS
COMMENT_COLUMN, LINE_WIDTH = 30, 110
LAST_SEED = 2**63 - 1  # that a torch.Generator takes
EXPONENT = re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$")  # to OmegaConf a number: a name wants quotes
KEYWORDS = {word: f"{word}_" for word in keyword.kwlist}  # a key such as `with` is the attribute `with_`
yaml.SafeDumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, None)

Schema = TypeVar("Schema")
Contradictions = Iterator[tuple[str, str]]  # (key, what is wrong with it and the cure)


class InputError(Exception):
    """The user's input is wrong: one line that names the file, key or value, and the cure. Exit code 2."""


# ---------------------------------------------------------------- fields of a schema


def number(
    default: Any, *, low: float = -math.inf, high: float = math.inf, above: float = -math.inf, help: str
) -> Any:
    """A dataclass field of a finite number (or a list of them): low <= value <= high and value > above."""
    return _field(default, {"low": low, "high": high, "above": above, "help": help})


def choice(default: Any, *options: str | None, help: str) -> Any:
    """A dataclass field holding one of the options (or a list of them)."""
    return _field(default, {"options": options, "help": help})


def text(default: str | None, *, help: str) -> Any:
    """A dataclass field holding a word, a path or nothing."""
    return _field(default, {"help": help})


def switch(default: bool, *, help: str) -> Any:
    """A dataclass field that is true or false."""
    return _field(default, {"help": help})


def section(schema: type, *, help: str) -> Any:
    """A dataclass field holding a tree of its own, with that tree's defaults."""
    return dataclasses.field(default_factory=schema, metadata={"help": help})


def required(*, help: str) -> Any:
    """A dataclass field that every recipe has to give."""
    return dataclasses.field(metadata={"help": help})


def optional(*, help: str) -> Any:
    """A dataclass field holding a tree of its own, or nothing."""
    return dataclasses.field(default=None, metadata={"help": help})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _violation(value: Any, rule: Mapping[str, Any]) -> str | None:
    """What a single value breaks of its field's rule, in words; None if nothing."""
    if "options" in rule and value not in rule["options"]:
        return f"one of {', '.join(map(str, rule['options']))}"
    if "low" not in rule:
        return None
    low, high = rule["low"], rule["high"]
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "a finite number"
    if value <= rule["above"]:
        return f"more than {rule['above']}"
    if low <= value <= high:
        return None
    if math.isfinite(low) and math.isfinite(high):
        return f"between {low} and {high}"
    return f"at least {low}" if math.isfinite(low) else f"at most {high}"


def check(node: Any, prefix: str = "", alone: bool = False) -> None:
    """Walk a tree of dataclasses: the range of every field, then unless alone each node's `contradictions()`.

    `contradictions` yields pairs (key, what is wrong and the cure). Raises InputError at the first.
    """
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        key = prefix + _plain(field.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{key}.", alone)
            continue
        nullable = field.type is not Any or field.default is None  # the reader knows all other types
        for item in value if isinstance(value, list) else [value]:
            wanted = None if item is None and nullable else _violation(item, field.metadata)
            if wanted:
                raise InputError(f"{key}: must be {wanted}, not {item!r}")
    for key, message in () if alone else getattr(node, "contradictions", lambda: ())():
        raise InputError(f"{prefix}{key}: {message}")


# ---------------------------------------------------------------- reading and writing


def load(
    schema: type[Schema], path: str | Path, overrides: Sequence[str] = (), alone: bool = False
) -> Schema:
    """The YAML file at `path`, changed by `key.sub=value` overrides, as a checked instance of `schema`.

    Raises InputError for whatever is wrong in it; contradicting values are not looked for if `alone`.
    """
    tree = OmegaConf.structured(schema)
    for key, value in _read_yaml(path).items():
        tree = _merge(tree, {key: value}, str(path), key)
    for override in overrides:
        tree = _merge(tree, _change(override), "command line", override.partition("=")[0])
    try:
        node: Any = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {error.full_key}: {str(error.msg).splitlines()[0]}") from None
    check(node, alone=alone)
    return node


def _change(override: str) -> dict:
    """The tree that an override `key.sub=value` means. Raises InputError."""
    if "=" not in override:
        cure = "; a recipe is named by --config" if override.endswith((".yaml", ".yml")) else ""
        raise InputError(f"{override!r}: an override reads key.sub=value{cure}")
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError):
        raise InputError(f"{override!r}: not a key with a YAML value") from None
    assert isinstance(tree, dict)  # a key makes a mapping
    return tree


def flat_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """{'data.source': 'digits', ...} of `key.sub=value` overrides. Raises InputError."""
    changes = [flatten(_change(override)) for override in overrides]
    return {key: value for change in changes for key, value in change.items()}


def _read_yaml(path: str | Path) -> dict:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "not text" if isinstance(error, UnicodeError) else error.strerror or error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise InputError(f"{path}: line {line}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values")
    return tree


def _merge(base: Any, tree: Any, where: str, key: str = "recipe") -> Any:
    try:
        return OmegaConf.merge(base, OmegaConf.create(_pythonic(tree)))
    except (OmegaConfBaseException, TypeError) as error:
        reason = " ".join(str(getattr(error, "msg", None) or error).split("\n")[0].split())
        raise InputError(f"{where}: {getattr(error, 'full_key', None) or key}: {reason}") from None


def _pythonic(tree: Any) -> Any:
    """A copy of the tree in which keys that are Python keywords gain an underscore."""
    if not isinstance(tree, dict):
        return tree
    return {KEYWORDS.get(key, key): _pythonic(value) for key, value in tree.items()}


def _plain(name: str) -> str:
    """The key that an attribute stands for in YAML."""
    return name.rstrip("_")


def as_tree(node: Any) -> dict[str, Any]:
    """A tree of dataclasses as nested dicts with the keys of the YAML."""
    tree = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        tree[_plain(field.name)] = as_tree(value) if dataclasses.is_dataclass(value) else value
    return tree


def dump(node: Any) -> str:
    """The tree as YAML that `load` reads back to an equal tree."""
    return yaml.safe_dump(as_tree(node), sort_keys=False, default_flow_style=None, width=120)


def template(node: Any, indent: str = "") -> Iterator[str]:
    """The YAML lines of a tree: every key, its value, its choices and its help; inherited keys last."""
    inherited = {name for base in type(node).__mro__[1:] for name in vars(base).get("__annotations__", ())}
    for field in sorted(dataclasses.fields(node), key=lambda field: field.name in inherited):
        value, line = getattr(node, field.name), f"{indent}{_plain(field.name)}:"
        options = " | ".join(option or "null" for option in field.metadata.get("options", ()))
        comment = "; ".join(filter(None, [options, field.metadata["help"]]))
        if dataclasses.is_dataclass(value):
            yield from commented(line, comment)
            yield from template(value, indent + "  ")
        else:
            yield from commented(f"{line} {yaml_value(value)}", comment)


def yaml_value(value: Any) -> str:
    """A value on one line, as it stands behind a key."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def commented(line: str, comment: str) -> Iterator[str]:
    """A line of YAML and its comment, which goes on under itself where it is long."""
    if not comment:
        yield line
        return
    column = max(COMMENT_COLUMN, len(line) + 2)
    wrapped = textwrap.wrap(comment, max(30, LINE_WIDTH - column - 2), break_on_hyphens=False)
    yield f"{line:<{column}}# {wrapped[0]}"
    yield from (f"{'':<{column}}# {rest}" for rest in wrapped[1:])


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'data.source': 'digits', ...} of a dataclass or of nested dicts."""
    if dataclasses.is_dataclass(tree):
        tree = as_tree(tree)
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def differences(old: Any, new: Any) -> list[str]:
    """The keys in which two trees differ, as 'key: old -> new'."""
    old, new = flatten(old), flatten(new)
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]


# ---------------------------------------------------------------- commands


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is one line, and every command says its version."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.add_argument("--version", action="version", version=f"Latent Stack {__version__}")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def check_range(options: argparse.Namespace, **ranges: tuple[float, float]) -> None:
    """Raises InputError where a flag is outside its range (or no finite number)."""
    for name, (low, high) in ranges.items():
        wanted = _violation(getattr(options, name), {"low": low, "high": high, "above": -math.inf})
        if wanted:
            raise InputError(f"--{name.replace('_', '-')}: must be {wanted}, not {getattr(options, name)}")


def say(line: str) -> None:
    """One line to the person at the terminal, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def say_tree(tree: dict, indent: str = "  ") -> None:
    """The numbers and words of nested dicts, a line each; lists and what is None are left out."""
    for key, value in tree.items():
        if isinstance(value, dict):
            say(f"{indent}{key}")
            say_tree(value, indent + "  ")
        elif not isinstance(value, list) and value is not None:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            say(f"{indent}{key:<{42 - len(indent)}}{shown}")


def run(main: Callable[[], Any]) -> None:
    """Run a command's main() and leave with its status.

    Without the interpreter's shutdown: taking torch's modules apart costs about a second, and a thread of
    gloo or of a progress bar that wakes up meanwhile may end a finished training with an abort; after an
    error a GPU that waits for other processes would not let go.
    """
    try:
        run_and_exit(main)
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # type: ignore[arg-type]  # run_and_exit leaves with numbers only


def run_and_exit(main: Callable[[], Any]) -> NoReturn:
    """Run a command and end with sys.exit, where wandb listens.

    Exit codes: 0: done; 2: wrong input or a disk that refuses (one line is printed); 130: Ctrl-C; 128 and
    the signal's number: a training that a signal stopped.
    """
    try:
        sys.exit(main())
    except InputError as error:
        # torch wraps what a loader process raised in its traceback; the last line is the error itself
        message = str(error).strip().splitlines()[-1].removeprefix("shared.config.InputError: ")
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        trouble = f"{error.filename or 'the disk'}: {error.strerror}"
        again = "name another folder" if error.errno in NO_RIGHTS else "run the same command again"
        print(f"error: {trouble}; what was saved is untouched, {again}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
