"""Strict settings from YAML: `extends`, `--set a.b=c`, and every problem at once, in the user's words.

Recipes and targets share this. A file may extend a shipped name or another file; mappings are merged key by key, lists and
plain values replace, and `set:` changes single values by the paths that `--set` takes. Unknown keys are errors that name the
nearest known one.
"""
from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from edgekd.errors import UsageError, closest, unknown

Model = TypeVar("Model", bound="Settings")
EXTENDS, SET = "extends", "set"


class Settings(BaseModel):
    """Base of every recipe and target model: no unknown keys, no silent change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Loader(yaml.SafeLoader):
    """YAML without the trap that a key given twice silently counts once."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: object) -> Any:
    """The value of a YAML document.

    Raises:
        UsageError: it is not YAML; the line is named.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: no code can run
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"this is not valid YAML: {getattr(e, 'problem', None) or e}", where=f"{where}{line}") from e


def is_path(reference: str | Path) -> bool:
    """Whether the user means a file rather than a shipped name."""
    return isinstance(reference, Path) or "/" in reference or reference.endswith((".yaml", ".yml"))


def load(reference: str | Path, kind: str, shipped: Mapping[str, Any], *, aliases: Mapping[str, str] | None = None) -> tuple[dict[str, Any], str]:
    """The merged mapping of a shipped name or a file, and where it came from.

    Args:
        reference: a name in `shipped`, or a path.
        kind: `recipe` or `target`, for messages.
        shipped: name -> anything with `read_text()`, or a ready mapping (a plug-in's).
        aliases: other name -> shipped name.

    Raises:
        UsageError: no such name or file, not YAML, or a chain of `extends` that comes back to itself.
    """
    return _load(reference, kind, shipped, aliases or {}, base=Path.cwd(), chain=())


def _load(reference: str | Path, kind: str, shipped: Mapping[str, Any], aliases: Mapping[str, str], *, base: Path,
          chain: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    raw, where, home = _read(reference, kind, shipped, aliases, base)
    if where in chain:
        raise UsageError(f"the {kind} extends itself: {' -> '.join([*chain, where])}", hint="take one `extends:` out")
    if not isinstance(raw, dict):
        raise UsageError(f"a {kind} is a mapping of keys to values", where=where, hint=f"start from a copy: edgekd init {kind} NAME my.yaml")
    raw = dict(raw)
    parent, changes = raw.pop(EXTENDS, None), raw.pop(SET, None) or {}
    if parent is not None:
        above, _ = _load(str(parent), kind, shipped, aliases, base=home, chain=(*chain, where))
        raw = merge(above, raw)
    if not isinstance(changes, dict):
        raise UsageError("`set:` is a mapping of paths to values", where=where, hint="for instance set: {stages.0.steps: 100}")
    for path, value in changes.items():
        raw = _assign(raw, str(path).split("."), value, f"{where}, set: {path}")
    return raw, where


def _read(reference: str | Path, kind: str, shipped: Mapping[str, Any], aliases: Mapping[str, str], base: Path) -> tuple[Any, str, Path]:
    """Raw value, where it came from, and the folder that relative paths in it start from."""
    if not is_path(reference):
        name = aliases.get(str(reference), str(reference))
        if name not in shipped:
            raise unknown(kind, str(reference), [*shipped, *aliases])
        source = shipped[name]
        return (dict(source) if isinstance(source, Mapping) else parse_yaml(source.read_text(encoding="utf-8"), name)), name, base
    path = (base / Path(reference).expanduser()).resolve()
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), path), str(path), path.parent
    except (OSError, UnicodeDecodeError) as e:
        reason = "it is not a text file" if isinstance(e, UnicodeDecodeError) else (e.strerror or str(e))
        raise UsageError(f"the {kind} cannot be read: {reason}", where=path, hint=f"edgekd list {kind}s shows the shipped ones") from e


def merge(above: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """`below` over `above`: mappings key by key, anything else replaced. Neither is changed."""
    merged = dict(above)
    for key, value in below.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def override(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b.0.c=value` one after another; values are YAML, numbers in a path are places in a list. Returns a new mapping.

    Raises:
        UsageError: no `=`, a place that a list does not have, or a path into a plain value.
    """
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            raise UsageError(f"--set takes KEY=VALUE, not '{assignment}'", hint="for instance --set stages.0.steps=100")
        raw = _assign(raw, path.strip().split("."), parse_yaml(value, f"--set {path}"), f"--set {path}")
    return raw


def _assign(node: Any, keys: list[str], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise UsageError(f"{path}: '{key}' is not a place in a list of {len(node)}", hint=f"places are 0 to {len(node) - 1}" if node else None)
        return [_assign(item, rest, value, path) if i == int(key) else item for i, item in enumerate(node)]
    if node is not None and not isinstance(node, dict):
        raise UsageError(f"{path}: there is nothing below a plain value ({node!r})", hint=f"set the key before '.{key}' itself")
    node = node or {}
    return {**node, key: _assign(node.get(key), rest, value, path)}


def validate(model: type[Model], raw: Mapping[str, Any], *, what: str, sets: Sequence[str] = ()) -> Model:
    """The typed settings with `--set` applied.

    Raises:
        UsageError: one message with every problem found.
    """
    if sets:
        try:  # with the defaults filled in, --set reaches lists that the file does not spell out
            complete = model.model_validate(dict(raw)).model_dump(mode="json")
        except ValidationError:
            complete = dict(raw)  # its problems are told below, together with those of --set
        raw = override(complete, sets)
    try:
        return model.model_validate(dict(raw))
    except ValidationError as e:
        problems = [describe(model, error) for error in e.errors()]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UsageError("\n  ".join([f"{what} has {count}:", *problems])) from e


def describe(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    """One pydantic error as a sentence with the key's full path."""
    loc = tuple(part for part in error["loc"] if part != "[key]")
    key = ".".join(str(p) for p in loc)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        near = closest(str(loc[-1]), fields_at(model, loc[:-1]))
        known = ", ".join(fields_at(model, loc[:-1]))
        return f"Unknown key: '{key}'" + (f", did you mean '{near}'?" if near else f" (known here: {known})")
    if kind == "missing":
        return f"Missing key: '{key}'"
    if kind == "value_error":
        reason = str(context.get("error", error["msg"]))
        return f"Invalid value for key '{key}': {reason}" if key else reason
    got = repr(error.get("input"))
    if kind == "literal_error":
        near = closest(str(error.get("input")), [w.strip("' ") for w in str(context["expected"]).replace(" or ", ", ").split(",")])
        return f"Invalid value for key '{key}': {got} is not {context['expected']}" + (f", did you mean '{near}'?" if near else "")
    return f"Invalid value for key '{key}': {error['msg'].replace('Input should', 'it should', 1)}, not {got if len(got) < 80 else got[:77] + '...'}"


def fields_at(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """The keys known at a path inside a model; empty when the path leads nowhere that has keys."""
    here: Any = model
    for part in loc:
        found = _model_in(here)
        if found is not None and isinstance(part, str) and part in found.model_fields:
            here = found.model_fields[part].annotation
        elif found is not None and typing.get_origin(here) is None:
            return []
    found = _model_in(here)
    return list(found.model_fields) if found else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model inside an annotation such as `list[Stage]`, `Budget | None` or `dict[str, Support]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None


def dump(settings: BaseModel) -> str:
    """Settings as YAML, in the order in which they are declared."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
