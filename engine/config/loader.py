"""Loader: YAML files and `--set a.b=value` -> a checked `Config`, and back to YAML.

The YAML read here is the 1.2 core schema: only true and false are booleans, 1e-3 is a number, and a
key given twice is an error. A number keeps its written form, so `factor: 1.1` is exactly 11/10.

Paths: a relative `--config` is looked up as it is written, then in configs/ (the suffix .yaml may
be left out). A relative `model.path`, `model.tokenizer`, `moe.placement` or `moe.policy` is looked
up from the working directory, then from the project's root; one that exists in neither is kept as
written. `~` is expanded in these, in `profiler.spans` and in `profiler.routing`, environment
variables are not.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

import yaml

from engine.config import CONTIGUOUS, Config, ModelConfig, MoEConfig, ProfilerConfig
from engine.config.validation import ConfigError, alternatives, field_problems, type_hints

_INSTALLED = Path(__file__).resolve().parents[2]
# Holds configs/: a checkout itself, or what setup.py puts into a wheel.
PROJECT_ROOT = next(filter(Path.is_dir, [_INSTALLED / "lockstep"]), _INSTALLED)
_MAX_DIGITS = 300


class _WrittenNumber(float):
    """A YAML number that remembers its text."""

    def __new__(cls, text: str) -> _WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


class _LongNumber(str):
    """The digits of a whole number that is too long for any setting."""

    def __repr__(self) -> str:
        return f"{self[:8]}... ({len(self)} digits)"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping as the base class does, but refuse a key that is given twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", mark
                )
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int | _LongNumber:
        """Return an int, or a `_LongNumber` where a float or `print` could not represent it."""
        return int(node.value) if len(node.value) <= _MAX_DIGITS else _LongNumber(node.value)

    def construct_written_number(self, node: yaml.ScalarNode) -> _WrittenNumber:
        """Return a float with its written text."""
        return _WrittenNumber(re.sub(r"\.?inf", "inf", self.construct_scalar(node).lower()))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists under their key."""
        super().increase_indent(flow, False)


_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|[-+]?\.?(inf|Inf|INF)$")
for _schema in (_Loader, _Dumper):  # the core schema, for both: a dump loads as it was
    for _tag, _pattern, _first in (
        ("null", re.compile(r"(null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
        ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
        ("int", re.compile(r"[-+]?\d+$"), list("-+0123456789")),
        ("float", _FLOAT, list("-+.0123456789iI")),
    ):
        _schema.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_written_number)


def _represent_number(dumper: _Dumper, number: _WrittenNumber) -> yaml.ScalarNode:
    kind = dumper.resolve(yaml.ScalarNode, number.text, (True, False))
    return dumper.represent_scalar(kind, number.text)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Plain and single-quoted text loses some kinds of line break; double-quoted text escapes them.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(_WrittenNumber, _represent_number)
_Dumper.add_representer(str, _represent_text)


def load_config(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Return the checked config of a file with overrides.

    A single value is accepted where a list is expected.

    Args:
        name_or_path: of a YAML file, as in `--config`.
        overrides: `section.key=value`, applied in order; the values are YAML.

    Raises:
        ConfigError: lists every unknown key, missing key, wrong type and broken rule.
    """
    path = find_config(name_or_path)
    tree = parse_yaml(_read(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections of keys ({', '.join(type_hints(Config))})")
    for override in overrides:
        _apply(tree, override)
    return config_from_tree(tree)


def find_config(name_or_path: str) -> Path:
    """Return the config file that a name means: a path first, then a file in configs/.

    Raises `ConfigError` with the folders searched and the nearest name there.
    """
    given = Path(name_or_path).expanduser()
    folders = [Path("configs"), PROJECT_ROOT / "configs"]
    stems = [given] if given.is_absolute() else [given, *(folder / given for folder in folders)]
    for stem in stems:
        for candidate in (stem, stem.with_name(stem.name + ".yaml")):
            if os.path.isfile(candidate):  # Path.is_file raises in a folder that may not be read
                return candidate
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    near = difflib.get_close_matches(given.name.removesuffix(".yaml"), names, n=1)
    raise ConfigError(
        f"--config {name_or_path}: no such file, here or in {folders[-1]}"
        + (f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}")
    )


def config_from_tree(tree: Mapping[str, Any]) -> Config:
    """Return a checked `Config` from nested mappings, as parsed YAML. Raises `ConfigError`."""
    problems: list[str] = []
    values = _section_values(Config, tree, "", problems)
    # A placeholder for what is missing lets the rest be checked too, for one list of all problems.
    model = values.setdefault("model", {})
    if isinstance(model, dict) and "path" not in model:
        problems.append("model.path: is missing; name a local Hugging Face checkpoint directory")
        model["path"] = "missing"
    try:
        config = _construct(Config, values)
    except ConfigError as error:
        problems.extend(error.problems)
    else:
        if not problems:
            return config
    raise ConfigError(*problems)


def to_yaml(config: Config) -> str:
    """Return the config as YAML with every key, in declared order; it loads as an equal config."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_yaml(tree: Any) -> str:
    """Return plain data as YAML, innermost lists and mappings on one line."""
    return yaml.dump(
        tree,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )


def written_number(text: str) -> float:
    """Return a number that `dump_yaml` writes as this text."""
    return _WrittenNumber(text)


def section_from_tree(section: type, tree: Mapping[Any, Any], prefix: str) -> Any:
    """Return a settings dataclass without sections of its own from a mapping, as parsed YAML.

    Args:
        prefix: text before each field's name in errors.

    Raises:
        ConfigError: lists every unknown key, wrong type and broken rule.
    """
    hints = type_hints(section)
    if unknown := [key for key in tree if key not in hints]:
        raise ConfigError(
            f"{prefix}{unknown[0]} = {_shown(tree[unknown[0]])}: unknown key; the keys here are "
            f"{', '.join(hints)}"
        )
    made = section(**{key: _convert(value, hints[key]) for key, value in tree.items()})
    if problems := list(field_problems(made, prefix)):
        raise ConfigError(*problems)
    return made


def digest(config: Config) -> str:
    """Return the sha256 (hex) of the config's YAML: equal for equal settings from any source."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); save "
            "it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; make it readable, or name another --config"
        ) from error


# Also what the constructors of explicit tags raise, and RecursionError for deep nesting.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def parse_yaml(text: str, source: str) -> Any:
    """Return what a YAML text holds; numbers keep their written form.

    source: of the text, as errors name it.

    Raises `ConfigError`.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _YAML_ERRORS as error:
        source = source if len(source) <= 200 else f"{source[:200]}..."
        raise ConfigError(f"{source}: is not valid YAML: {error}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: must be section.key=value")
    for depth, key in enumerate(keys[:-1], start=1):
        below = tree.setdefault(key, {})
        if below is None:  # a section whose keys are all commented out
            below = tree[key] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override}: {'.'.join(keys[:depth])} holds no keys")
        tree = below
    tree[keys[-1]] = parse_yaml(text, f"--set {override}")
    if comment := _comment(text):
        raise ConfigError(
            f"--set {override}: {comment} is a comment in YAML and would be left out; quote the "
            f"""value: --set '{name}="{text.strip()}"'"""
        )


def _comment(text: str) -> str:
    """Return the comment at the end of a YAML text, "" without one."""
    end = max((token.end_mark.index for token in list(yaml.scan(text))[:-1]), default=0)
    rest = text[end:].strip()
    return rest if rest.startswith("#") else ""


def _section_values(
    section: type, tree: Mapping[Any, Any], prefix: str, problems: list[str]
) -> dict[str, Any]:
    """Return the known keys of one section, converted; add a problem for each unknown key."""
    hints, values = type_hints(section), {}
    for key, value in tree.items():
        if key not in hints:
            near = _nearest_key(prefix, str(key))
            problems.append(f"{prefix}{key} = {_shown(value)}: unknown key{near}")
        elif long := [item for item in _items(value) if isinstance(item, _LongNumber)]:
            problems.append(f"{prefix}{key} = {long[0]!r}: must have at most {_MAX_DIGITS} digits")
            if (prefix, key) == ("model.", "path"):
                values[key] = "wrong"  # but not missing
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            values[key] = _section_values(hints[key], value, f"{prefix}{key}.", problems)  # type: ignore[arg-type]
        elif dataclasses.is_dataclass(hints[key]) and value is None:
            values[key] = {}
        else:
            values[key] = _convert(value, hints[key])
    return values


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _construct(section: type, values: Mapping[str, Any]) -> Any:
    hints = type_hints(section)
    built = {
        key: _construct(hints[key], value)
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict)
        else value
        for key, value in values.items()
    }
    if section is ModelConfig:
        built.update({key: _resolve(built[key]) for key in ("path", "tokenizer") if key in built})
    if section is MoEConfig and built.get("placement", CONTIGUOUS) != CONTIGUOUS:
        built["placement"] = _resolve(built["placement"])
    if section is MoEConfig and built.get("policy") is not None:
        built["policy"] = _resolve(built["policy"])
    if section is ProfilerConfig:
        for key in ("spans", "routing"):
            if isinstance(built.get(key), str):
                built[key] = os.path.expanduser(built[key])
    return section(**built)


def _convert(value: Any, hint: Any) -> Any:
    """Return a YAML value in the field's type, or unchanged, for the checks, if it does not fit."""
    if get_origin(hint) is tuple and value is not None:
        items = _items(value)
        if value == "both":  # all choices, of the two of moe.capacity.phases
            items = list(get_args(get_args(hint)[0])) or items
        return tuple(_convert(item, get_args(hint)[0]) for item in items)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if _is_written(hint):
            return value.text if isinstance(value, _WrittenNumber) else str(value)
        if float in alternatives(hint) or isinstance(value, _WrittenNumber):
            return float(value)
    return value


def _is_written(hint: Any) -> bool:
    """Return whether a field keeps a number as its written text."""
    return {str, float} <= set(alternatives(hint))


def _resolve(path: Any) -> Any:
    if isinstance(path, str):
        path = os.path.expanduser(path)
    # os.path: Path.exists raises for a name that is too long or in a folder that may not be read.
    if not isinstance(path, str) or not path or os.path.exists(path):
        return path
    below_root = PROJECT_ROOT / path
    return str(below_root) if os.path.exists(below_root) else path


def _all_keys(section: type, prefix: str = "") -> Iterator[str]:
    for key, hint in type_hints(section).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{key}.")  # type: ignore[arg-type]


def _nearest_key(prefix: str, key: str) -> str:
    """Return a hint with the nearest valid key: of this section first, then of any."""
    known = list(_all_keys(Config))
    here = [name[len(prefix) :] for name in known if name.rpartition(".")[0] == prefix[:-1]]
    if near := difflib.get_close_matches(key, here, n=1):
        return f"; did you mean {prefix}{near[0]}?"
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    if near := difflib.get_close_matches(key, leaves, n=1, cutoff=0.75):
        return f"; did you mean {leaves[near[0]]}?"
    return f"; the keys here are {', '.join(here)}"


def _plain(value: Any, hint: Any = None) -> Any:
    """Return dataclasses as mappings, tuples as lists, a number that is kept as text as such."""
    if dataclasses.is_dataclass(value):
        hints = type_hints(type(value))  # type: ignore[arg-type]
        return {key: _plain(getattr(value, key), hints[key]) for key in hints}
    if isinstance(value, tuple):
        return list(value)
    return _WrittenNumber(str(value)) if _is_written(hint) else value
