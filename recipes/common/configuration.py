"""The configuration of a run in one YAML file, `--config FILE.yaml [--key value ...]`, and the paths that it names."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

PACKAGE_SCHEME = "package://"


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}. `--help` lists the keys and what they take.")


def parse_configuration(dataclasses: Iterable[type], arguments: Sequence[str]) -> dict[str, Any]:
    """The value of every field of `dataclasses`, from a YAML file and the command line, which takes precedence.

    A line `key: value` of the file is equivalent to `--key=value` on the command line; `null` keeps the default.

    Args:
        dataclasses: classes whose fields are the keys, with no name in common.
        arguments: the command line without the program, for example `["--config", "run.yaml", "--seed", "1"]`.

    Raises:
        ValueError: for a missing or malformed file, a key that no class has, or a value of the wrong type; the message
            names the file and the key.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, overrides = first.parse_known_args(arguments)
    parser = _Parser(list(dataclasses), allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with any of these keys.")
    keys = {field.name for dataclass in dataclasses for field in fields(dataclass) if field.init}
    from_file = _file_arguments(known.config, keys) if known.config else []
    namespace, unknown = parser.parse_known_args([*from_file, *overrides])
    if unknown:
        raise ValueError(f"The command line has what no key takes: {' '.join(unknown)}. `--help` lists the keys.")
    return {key: value for key, value in vars(namespace).items() if key in keys}


def _file_arguments(path: Path, keys: set[str]) -> list[str]:
    if not path.is_file():
        raise ValueError(f"There is no configuration file {path}. Name a YAML file, for example one under recipes/.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(values).__name__}.")
    unknown = [key for key in values if key not in keys]
    if unknown:
        raise ValueError(
            f"{path} has the unknown key `{unknown[0]}`: it would have no effect. Correct its spelling or take it "
            "out; `--help` lists the keys."
        )
    arguments: list[str] = []
    for key, value in values.items():
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            arguments.append(f"--{key}={json.dumps(value)}")
        elif value is not None:
            arguments.append(f"--{key}={value}")
    return arguments


def resolve(name: str) -> str:
    """`name` itself or, for `package://PACKAGE/PATH`, the path in an installed package, which is not imported.

    Raises:
        ValueError: if the package is not installed or has no such file or folder.
    """
    if not name.startswith(PACKAGE_SCHEME):
        return name
    package, _, inside = name.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{name}: the package {package!r} is not installed. Install what the recipes use with "
            "pip install -e '.[recipes]' in the checkout, or name a file, a folder or a model on the Hub."
        )
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise ValueError(f"{name}: the package {package!r} has no {inside!r} ({path} does not exist).")
    return str(path)


@contextmanager
def fetching(key: str, name: str) -> Iterator[None]:
    """Wraps code that loads a model or a data set by its name on the Hub, or from a folder.

    Raises:
        ValueError: if `name` is not a folder, and the Hub cannot be reached or does not have it; with the remedy.
    """
    try:
        yield
    except OSError as error:
        if Path(name).exists():
            raise
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ValueError(
            f"`{key}` is {name}, which is no folder here and could not be had from the Hub ({reason}). Check its "
            "spelling, and the connection (HF_HUB_OFFLINE is not to be set); where there is no Hub, name a folder that "
            "it was saved to, or take a YAML file that needs none: the recipe's README.md says which."
        ) from error
