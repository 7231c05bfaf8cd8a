"""YAML and dotted overrides -> strict, typed dataclasses; every mistake becomes one line and exit code 2.

Knows how a schema is read, checked, written and compared. Refuses to know any key of any recipe.
Standard library and OmegaConf only, so that a wrong recipe is answered before torch is imported.
"""

import argparse
import atexit
import dataclasses
import errno
import keyword
import math
import os
import sys

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}


class InputError(Exception):
    """The user's input is wrong: one line that names the file, key or value, and the cure. Exit code 2."""


# ---------------------------------------------------------------- fields of a schema


def number(default, *, low=-math.inf, high=math.inf, above=-math.inf):
    """A dataclass field holding a finite number (or a list of them) with low <= value <= high and value > above."""
    metadata = {"low": low, "high": high, "above": above}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def choice(default, *options):
    """A dataclass field holding one of the options (or a list of them)."""
    metadata = {"options": options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _violation(value, rule) -> str | None:
    """What a single value breaks of its field's rule, in words; None if nothing."""
    if "options" in rule and value not in rule["options"]:
        return f"one of {', '.join(map(str, rule['options']))}"
    if "low" in rule:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return "a finite number"
        if value <= rule["above"]:
            return f"more than {rule['above']}"
        if not rule["low"] <= value <= rule["high"]:
            low, high = rule["low"], rule["high"]
            if math.isfinite(low) and math.isfinite(high):
                return f"between {low} and {high}"
            return f"at least {low}" if math.isfinite(low) else f"at most {high}"
    return None


def check(node, prefix: str = "") -> None:
    """Walk a tree of dataclasses: the range of every field, then each node's own `contradictions()`.

    `contradictions` yields pairs (key, what is wrong and the cure). Raises InputError at the first.
    """
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name.rstrip('_')}"
        if dataclasses.is_dataclass(value):
            check(value, f"{key}.")
        elif value is not None and field.metadata:
            for item in value if isinstance(value, list) else [value]:
                if wanted := _violation(item, field.metadata):
                    raise InputError(f"{key}: must be {wanted}, not {item!r}")
    for key, message in getattr(node, "contradictions", lambda: ())():
        raise InputError(f"{prefix}{key}: {message}")


# ---------------------------------------------------------------- reading and writing


def _rename(tree, old: str, new: str):
    """A copy of the tree in which keys that are Python keywords (`with`) gain or lose an underscore."""
    if not isinstance(tree, dict):
        return tree
    words = {f"{word}{old}": f"{word}{new}" for word in keyword.kwlist}
    return {words.get(key, key): _rename(value, old, new) for key, value in tree.items()}


def _merge(base, tree, where: str):
    try:
        return OmegaConf.merge(base, OmegaConf.create(_rename(tree, "", "_")))
    except OmegaConfBaseException as error:
        reason = " ".join(str(error.msg or error).split("\n")[0].split())
        raise InputError(f"{where}: {error.full_key or 'recipe'}: {reason}") from None


def _read_yaml(path) -> dict:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise InputError(f"{path}: line {line}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values")
    return tree


def load(schema: type, path, overrides: list[str] = ()):
    """The YAML file at `path`, changed by `key.sub=value` overrides, as a checked instance of `schema`.

    Raises InputError: unreadable file, unknown key (with the nearest known one), wrong type, value out of
    range, contradicting values.
    """
    tree = _merge(OmegaConf.structured(schema), _read_yaml(path), str(path))
    for override in overrides:
        if "=" not in override:
            raise InputError(f"{override!r}: an override reads key.sub=value")
        try:
            change = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError):
            raise InputError(f"{override!r}: not a key with a YAML value") from None
        tree = _merge(tree, change, "command line")
    try:
        recipe = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {error.full_key}: {str(error.msg).splitlines()[0]}") from None
    check(recipe)
    return recipe


def dump(node) -> str:
    """The dataclass tree as YAML that `load` reads back to an equal tree."""
    return yaml.safe_dump(_rename(dataclasses.asdict(node), "_", ""), sort_keys=False, default_flow_style=None, width=120)


def flatten(tree, prefix: str = "") -> dict:
    """{'data.source': 'digits', ...} of a dataclass or of nested dicts."""
    tree = dataclasses.asdict(tree) if dataclasses.is_dataclass(tree) else tree
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(old, new) -> list[str]:
    """The keys in which two trees differ, as 'key: old -> new'."""
    old, new = flatten(old), flatten(new)
    keys = dict.fromkeys([*old, *new])
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


# ---------------------------------------------------------------- commands


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is one line."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def at_least(options: argparse.Namespace, **lows: float) -> None:
    """Raises InputError where a flag is below its least value (or no number at all)."""
    for name, low in lows.items():
        if not getattr(options, name) >= low:
            raise InputError(f"--{name.replace('_', '-')}: must be at least {low}, not {getattr(options, name)}")


def show(tree: dict, indent: str = "  ") -> None:
    """The numbers and words of nested dicts, a line each; lists and what is None are left out."""
    for key, value in tree.items():
        if isinstance(value, dict):
            say(f"{indent}{key}")
            show(value, indent + "  ")
        elif not isinstance(value, list) and value is not None:
            say(f"{indent}{key:<{42 - len(indent)}}{f'{value:.4g}' if isinstance(value, float) else value}")


def say(text: str) -> None:
    """One line to the person at the terminal, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def run(main) -> None:
    """Run a command's main() and leave with its status.

    Without Python's own farewell: taking torch's modules apart costs about a second, and a thread of gloo or of a
    progress bar that wakes up meanwhile may end a finished training with an abort.
    """
    try:
        run_and_exit(main)
    except SystemExit as leaving:
        code = leaving.code or 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_and_exit(main) -> None:
    """sys.exit, where wandb listens, with 0: done, 2: the input is wrong or the disk refuses (one line on stderr), 130: Ctrl-C."""
    try:
        sys.exit(main())
    except InputError as error:
        # torch wraps what a loader process raised in its traceback; the last line is the error itself
        print(f"error: {str(error).strip().splitlines()[-1].removeprefix('shared.config.InputError: ')}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK:
            raise
        trouble = f"{error.filename or 'the disk'}: {error.strerror}"
        print(f"error: {trouble}; what was saved before is untouched, run the same command again", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
