"""Between plain data and the dataclasses of `config.py`: parsing, overriding one field by text, JSON, differences.

Paths are dotted, tuple elements by their number: `data.sources.0.paths`. Every complaint is a `ConfigError` that starts
with such a path.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from dsv2_jax.config import ConfigError


def parse(cls: type, mapping: Mapping, path: str = ""):
    """The dataclass `cls` from nested plain data, such as `ConfigDict.to_dict()` or what `json` reads.

    Fields that are absent take their defaults. An unknown key, a missing field, a value of another type than declared
    (an integer may stand for a float, a list for a tuple, nothing else) or one that `cls` refuses raises `ConfigError`.
    """
    if not isinstance(mapping, Mapping):
        raise _wrong(cls, mapping, path)
    hints = _hints(cls)
    for key in mapping:
        if key not in hints:
            raise _unknown(key, cls, path)
    for field in dataclasses.fields(cls):
        if _required(field) and field.name not in mapping:
            raise ConfigError(f"{_join(path, field.name)}: is missing, and has no default in {cls.__name__}")
    values = {key: _parse(hints[key], value, _join(path, key)) for key, value in mapping.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        message, own = str(error), f"{cls.__name__}."
        named = message.removeprefix(own) if message.startswith(own) else None
        raise ConfigError(_join(path, named) if named else f"{path or cls.__name__}: {message}") from None


def to_dict(config) -> dict[str, Any]:
    """Nested plain data with every field present; `parse` gives `config` back."""
    return dataclasses.asdict(config)


def to_json(config) -> str:
    """`config` as the text of a config.json."""
    return json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"


def from_json(cls: type, text: str):
    """What `to_json` wrote, exactly."""
    try:
        mapping = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{cls.__name__}: is not JSON ({error})") from None
    return parse(cls, mapping)


def diff(a, b) -> list[tuple[str, Any, Any]]:
    """(path, value in `a`, value in `b`) of every field in which two configurations differ."""
    return list(_diff(to_dict(a), to_dict(b), ""))


def override(cls: type, mapping: Mapping, path: str, text: str) -> dict[str, Any]:
    """`mapping`, to be parsed as `cls`, with the field at `path` set to the value that `text` spells for its type.

    `None` switches an optional field or section off. Setting a field of a section that is off switches it on, its other
    fields at their defaults; `{}` does so for the section alone. Tuples are written `a,b` or as Python writes them.
    """
    names = re.sub(r"\[(\d+)\]", r".\1", path).split(".")
    return _override(cls, mapping, names, text, "", cls)


def paths(cls: type, path: str = "") -> Iterator[str]:
    """The dotted path of every field of `cls`, sections included; `0` stands for each element of a tuple."""
    for name, kind in _hints(cls).items():
        here = _join(path, name)
        yield here
        for option in _options(kind):
            item = typing.get_args(option)[0] if typing.get_origin(option) is tuple else option
            if dataclasses.is_dataclass(item):
                yield from paths(item, here if item is option else _join(here, "0"))


# --- types -----------------------------------------------------------------------------------------------------------


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _options(kind) -> tuple:
    """The members of a union; any other type alone."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _sections(kind) -> list[type]:
    return [option for option in _options(kind) if dataclasses.is_dataclass(option)]


def _choose(sections: list[type], mapping: Mapping, path: str) -> type:
    """The one of several dataclasses whose default `kind` is the one `mapping` states."""
    if len(sections) == 1:
        return sections[0]
    known = {_defaults(section)["kind"]: section for section in sections}
    kind = mapping.get("kind")
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"{path}.kind={kind!r}: must be one of {', '.join(known)}")
    return known[kind]


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _defaults(cls: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}


def _parse(kind, value, path: str):
    options = _options(kind)
    if value is None and types.NoneType in options:
        return None
    if sections := _sections(kind):
        if not isinstance(value, Mapping):
            raise _wrong(kind, value, path)
        return parse(_choose(sections, value, path), value, path)
    (kind_,) = (option for option in options if option is not types.NoneType)
    if typing.get_origin(kind_) is tuple:
        if not isinstance(value, (tuple, list)):
            raise _wrong(kind, value, path)
        item = typing.get_args(kind_)[0]
        return tuple(_parse(item, element, _join(path, str(index))) for index, element in enumerate(value))
    if kind_ is float and type(value) is int and abs(value) <= 2**1023:
        value = float(value)
    if not isinstance(value, kind_) or (isinstance(value, bool) and kind_ is not bool):
        raise _wrong(kind, value, path)
    if kind_ is float and not math.isfinite(value):
        raise ConfigError(f"{path}={value!r}: must be finite")
    return kind_(value)


# --- overriding ------------------------------------------------------------------------------------------------------


def _override(kind, value, names: list[str], text: str, path: str, root: type):
    if not names:
        return _read(kind, text)
    (name, *rest), (option, *_) = names, _options(kind)
    if sections := _sections(kind):
        value = {} if value is None else value
        cls = _choose(sections, value, path) if isinstance(value, Mapping) else sections[0]
        if name not in _hints(cls) or not isinstance(value, Mapping):
            raise _unknown(name, cls, path, root)
        old = value[name] if name in value else _defaults(cls).get(name)
        old = to_dict(old) if dataclasses.is_dataclass(old) else old
        return {**value, name: _override(_hints(cls)[name], old, rest, text, _join(path, name), root)}
    if typing.get_origin(option) is tuple:
        items = list(value) if isinstance(value, (tuple, list)) else []
        if not (name.isascii() and name.isdigit()) or int(name) >= len(items):
            raise ConfigError(f"{_join(path, name)}: {path} has {len(items)} elements, numbered from 0")
        index, item = int(name), typing.get_args(option)[0]
        items[index] = _override(item, items[index], rest, text, _join(path, name), root)
        return tuple(items)
    raise ConfigError(f"{'.'.join([path, *names])}: {path} is {_spell(kind)} and has no fields")


def _read(kind, text: str):
    """The value `text` spells for `kind`; where it spells none, `text`, of which `parse` will complain."""
    options = _options(kind)
    if text == "None" and types.NoneType in options:
        return None
    option = options[0]
    try:
        if typing.get_origin(option) is tuple:
            if text[:1] in ("(", "["):
                with contextlib.suppress(ValueError, SyntaxError):  # a glob may begin so, too
                    return ast.literal_eval(text)
            item = typing.get_args(option)[0]
            return tuple(_read(item, part.strip()) for part in text.split(",")) if text else ()
        if dataclasses.is_dataclass(option):
            return ast.literal_eval(text)
        if option is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        return option(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


# --- differences and messages ----------------------------------------------------------------------------------------


def _diff(a, b, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _diff(a[key], b[key], _join(path, key))
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from _diff(*pair, _join(path, str(index)))
    elif a != b:
        yield path, a, b


def _join(path: str, name) -> str:
    return f"{path}.{name}" if path else str(name)


TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", types.NoneType: "None"}


def _spell(kind) -> str:
    """The type `kind` in words."""
    if typing.get_origin(kind) is tuple:
        return f"a tuple, each element {_spell(typing.get_args(kind)[0])}"
    if dataclasses.is_dataclass(kind):
        return f"a section ({kind.__name__})"
    return TYPE_NAMES.get(kind) or " or ".join(_spell(option) for option in _options(kind))


def _wrong(kind, value, path: str) -> ConfigError:
    return ConfigError(f"{path or 'config'}={value!r}: must be {_spell(kind)}")


def _unknown(key, cls: type, path: str, root: type | None = None) -> ConfigError:
    """Suggests the nearest field of `cls`; failing that, one of the same name elsewhere in `root`."""
    here, known = _join(path, key), list(_hints(cls))
    near = [_join(path, name) for name in difflib.get_close_matches(str(key), known, n=1)]
    elsewhere = [other for other in paths(root) if other.split(".")[-1] == key] if root else []
    guess = (near or elsewhere or [None])[0]
    advice = f"did you mean {guess}?" if guess else f"the fields there are {', '.join(known)}"
    return ConfigError(f"{here}: is not a field of {cls.__name__}; {advice}")
