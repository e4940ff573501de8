"""Configurations as text: YAML to settings that know their place, settings to a checked Config, a Config to YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from raybert.config import Config
from raybert.errors import UserError

CONFIG = "config.yaml"  # in a run directory
SHIPPED_DIR = Path(__file__).parent / "configs"
SECTIONS: Mapping[str, type] = {
    name: hint for name, hint in get_type_hints(Config).items() if isinstance(hint, type) and is_dataclass(hint)
}
"""Section name -> its dataclass."""
FIELDS: Mapping[str, Any] = {
    **{name: hint for name, hint in get_type_hints(Config).items() if name not in SECTIONS},
    **{f"{name}.{key}": hint for name, section in SECTIONS.items() for key, hint in get_type_hints(section).items()},
}
"""Dotted name of every field -> its type."""


@dataclass(frozen=True)
class Setting:
    """One value for one field, and where the user wrote it."""

    name: str
    value: object
    place: str


def config_to_yaml(config: Config) -> str:
    """Every field, in the order of the dataclasses; `config_from_yaml` gives an equal Config back."""
    text: str = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    return text


def config_from_yaml(text: str, place: str = "YAML") -> Config:
    return build_config(read_settings(text, place))


def build_config(settings: Iterable[Setting]) -> Config:
    """The defaults with the settings laid over them, later ones over earlier ones; UserError for a name or type."""
    values: dict[str, dict[str, Any]] = {}
    for setting in settings:
        section, _, field = setting.name.rpartition(".")
        values.setdefault(section, {})[field] = _typed_value(setting)
    sections = {name: make(**values.get(name, {})) for name, make in SECTIONS.items()}
    return Config(**values.get("", {}), **sections)


def load_settings(name_or_path: str) -> list[Setting]:
    """The settings of a YAML file, or of the shipped configuration of that name."""
    path = Path(name_or_path)
    if not path.is_file() and name_or_path in shipped_names():
        path = SHIPPED_DIR / f"{name_or_path}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        names = ", ".join(shipped_names())
        raise UserError(
            f"cannot read the configuration {name_or_path}: {reason}; give the path of a YAML file or one of {names}."
        ) from None
    return read_settings(text, str(path))


def load_config(name_or_path: str | None = None, **overrides: object) -> Config:
    """The configuration of a YAML file, or a shipped one by its name, with other values laid over it.

    Args:
        name_or_path: None: the defaults.
        overrides: a section's fields as a mapping (`training={"num_steps": 100}`), a setting that is in none
            (`run_dir="runs/first"`), or dotted names (`**{"training.num_steps": 100}`).

    Raises:
        UserError: there is no such configuration or setting, or a value is wrong.
    """
    settings = [] if name_or_path is None else load_settings(name_or_path)
    return build_config([*settings, *_overriding(overrides)])


def _overriding(overrides: Mapping[str, object]) -> Iterator[Setting]:
    for name, value in overrides.items():
        if name in SECTIONS:
            if not isinstance(value, Mapping):
                raise UserError(f"load_config: {name} is a section; give a mapping of its fields, got {value!r}.")
            yield from (Setting(f"{name}.{key}", each, "load_config") for key, each in value.items())
        else:
            yield Setting(name, value, "load_config")


def shipped_names() -> list[str]:
    return sorted(path.stem for path in SHIPPED_DIR.glob("*.yaml"))


def read_settings(text: str, place: str) -> list[Setting]:
    """The settings of a YAML document, each placed by line. Unlike yaml.safe_load it refuses a key written twice."""
    loader = yaml.SafeLoader(text)
    loader.name = place  # for PyYAML's own messages
    try:
        root = loader.get_single_node()
        settings = [] if root is None else list(_settings_of(loader, root, "", place))
    except yaml.YAMLError as error:
        raise UserError(f"{place}: not valid YAML; mend this: {error}") from None
    finally:
        loader.dispose()
    _check_unique(settings)
    return settings


def _settings_of(loader: yaml.SafeLoader, node: yaml.Node, prefix: str, place: str) -> Iterator[Setting]:
    if not isinstance(node, yaml.MappingNode):
        kind = f"the section {prefix.rstrip('.')}" if prefix else "a configuration"
        line = node.start_mark.line + 1
        raise UserError(f"{place}, line {line}: {kind} must be lines of 'name: value', got {node.value!r}.")
    for key_node, value_node in node.value:
        name = prefix + str(key_node.value)
        if name not in SECTIONS:
            value = loader.construct_object(value_node, deep=True)
            yield Setting(name, value, f"{place}, line {key_node.start_mark.line + 1}")
        elif value_node.tag != "tag:yaml.org,2002:null":  # a section whose lines are all commented out
            yield from _settings_of(loader, value_node, f"{name}.", place)


def _check_unique(settings: list[Setting]) -> None:
    first: dict[str, Setting] = {}
    for setting in settings:
        other = first.setdefault(setting.name, setting)
        if other is not setting:
            raise UserError(f"{setting.place}: {setting.name} was set before ({other.place}); keep one of the two.")


def unknown_name_error(shown: str, place: str, known: Iterable[str], dashes: str = "") -> UserError:
    """The error for a name that is none of `known`; `dashes` is what flags begin with."""
    nearest = nearest_name(shown, known)
    remedy = f"did you mean {dashes}{nearest}?" if nearest else "'train --help' lists every setting."
    return UserError(f"{place}: unknown setting {dashes}{shown}; {remedy}")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, as a whole or in its last part: training.lerning_rate is the optimizer's.

    Among equals one with a section, if `name` has one, and then the one most like it as a whole.
    """

    def likeness(candidate: str) -> tuple[float, bool, float]:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, last), ("." in name) == ("." in candidate), whole

    best = max(known, key=likeness)
    return best if likeness(best)[0] >= 0.7 else None


def _typed_value(setting: Setting) -> object:
    if setting.name not in FIELDS:
        raise unknown_name_error(setting.name, setting.place, [*FIELDS, *SECTIONS])
    hint = FIELDS[setting.name]
    value = _as_float(setting.value) if float in (hint, *get_args(hint)) else setting.value
    if not _has_type(value, hint):
        raise UserError(f"{setting.place}: {setting.name} must be {describe_type(hint)}, got {setting.value!r}.")
    return value


def _as_float(value: object) -> object:
    """YAML reads 1 as int and 1e-4 (no point) as text; for a float field both are numbers."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _has_type(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, option) for option in get_args(hint))
    return type(value) is hint  # not isinstance: True is no int here


def describe_type(hint: Any) -> str:
    """A type in a user's words: 'int', 'true or false', 'str or null', 'int or auto', 'one of fp32, bf16, fp16'."""
    if get_origin(hint) is Literal:
        values = get_args(hint)
        return f"one of {', '.join(values)}" if len(values) > 1 else str(values[0])
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(describe_type(option) for option in get_args(hint))
    return "true or false" if hint is bool else "null" if hint is type(None) else str(hint.__name__)
