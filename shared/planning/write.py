"""A plan as a recipe of YAML, a line for each choice with its reason; and a plan that is there already."""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from shared.config import commented, yaml_value

UNTIL = "until: "

Lines = Mapping[str, tuple[Any, str]]


def text(lines: Lines, command: str, notes: list[str]) -> str:
    """The recipe as YAML.

    Arguments:
        lines: dotted keys with their values and reasons.
        command: what made it, by which the same plan is known again.
        notes: what was seen and what is expected, a line each.
    """
    head = [f"# {command}", *(f"# {note}" for note in notes)]
    return "".join(f"{line}\n" for line in [*head, *_yaml(_tree(lines))])


def _tree(lines: Lines) -> dict[str, Any]:
    """Nested dicts of dotted keys, in their order; leaves are pairs of value and reason."""
    tree: dict[str, Any] = {}
    for key, choice in lines.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = choice
    return tree


def _yaml(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _yaml(value, indent + "  ")
        else:
            yield from commented(f"{indent}{key}: {yaml_value(value[0])}", value[1])


def command_of(path: Path) -> str | None:
    """What made the plan in a file; None where there is none."""
    if not path.is_file():
        return None
    with open(path) as file:
        return file.readline().removeprefix("# ").rstrip("\n")


def until(path: Path) -> datetime | None:
    """When the samples of a plan with minutes shall be there; None of one without."""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith(f"# {UNTIL}"):
            return datetime.fromisoformat(line.removeprefix(f"# {UNTIL}"))
    return None


def due(moment: datetime) -> str:
    """The note that says when the samples shall be there."""
    return f"{UNTIL}{moment.isoformat(timespec='seconds')}"


def postponed(content: str, moment: datetime) -> str:
    """A plan whose samples shall be there at another moment."""
    return re.sub(f"(?m)^# {UNTIL}.*", f"# {due(moment)}", content)


def replaced(content: str, values: Mapping[str, Any]) -> str:
    """A plan with other values of dotted keys; the reasons stay."""
    lines: list[str] = []
    parents: list[str] = []
    for line in content.splitlines():
        found = re.match(r"( *)(\w+):( *)([^\s#]*)", line)
        if found and not line.startswith("#"):
            indent, key, space, value = found.groups()
            parents = [*parents[: len(indent) // 2], key]
            new = values.get(".".join(parents))
            if new is not None and value:
                line = f"{indent}{key}:{space}{str(new).ljust(len(value))}{line[found.end() :]}"
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)
