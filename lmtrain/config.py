"""Reading and writing settings: recipes, TOML files, `--set`.

Precedence: defaults < configuration file < `--set` < named options. All problems are reported
together, before torch is imported.
"""

import difflib
import importlib.resources
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from lmtrain.errors import ConfigError
from lmtrain.schema import UNKNOWN, Config, default, settings, unknown_options

FORMAT = 1

DEFAULT_RECIPE = "python-docs"
"""The recipe of a training without arguments."""

_MAX_BYTES = 1_000_000


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(_recipe_names())


def _recipe_names() -> Iterator[str]:
    for entry in importlib.resources.files("lmtrain.configs").iterdir():
        if entry.name.endswith(".toml"):
            yield entry.name.removesuffix(".toml")


def load(source: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """The settings of a recipe or TOML file, or the defaults, with overrides.

    Args:
        source: name of a recipe, or path of a TOML file; None for the defaults.
        overrides: values by path, such as {"train.seq_len": 70}.

    Raises:
        ConfigError: the file is missing or not TOML, or a setting is unknown or invalid.

    Example:
        >>> load(overrides={"train.seq_len": 70}).train.seq_len
        70
    """
    return parse("" if source is None else _read(source), str(source or "options"), overrides)


def parse(text: str, origin: str, overrides: Mapping[str, object] | None = None) -> Config:
    """The settings of a TOML text, with overrides.

    Args:
        text: the TOML text.
        origin: its file name or source, for messages.
        overrides: values by path.

    Raises:
        ConfigError: not TOML, another format version, or a setting is unknown or invalid.
    """
    try:
        tree: dict[str, Any] = tomllib.loads(text)
        repr(tree)  # raises for a hexadecimal number with more digits than Python converts
    except (ValueError, RecursionError) as error:
        # ValueError: not TOML, or such a number.
        raise ConfigError(f"{origin} is not valid TOML: {error}") from None
    version = tree.pop("format", FORMAT)
    if version != FORMAT:
        raise ConfigError(
            f"{origin} has configuration format {version!r}",
            f"this version of lmtrain reads format {FORMAT}",
        )
    for path, value in (overrides or {}).items():
        section, dot, name = path.partition(".")
        part = tree.setdefault(section, {})
        if not dot or not isinstance(part, dict):
            raise ConfigError(_unknown_setting(path))
        _require_unicode(path, value, origin)
        part[name] = value
    try:
        return Config.model_validate(_with_none(tree))
    except ValidationError as error:
        # The validator of the whole tree finds them only if all sections are valid.
        unknown = [_unknown_setting(f"model.{name}") for name in unknown_options(tree.get("model"))]
        problems = list(dict.fromkeys([*unknown, *_describe(error)]))
        raise ConfigError(*_message_lines(problems, origin)) from None


def _require_unicode(path: str, value: object, origin: str) -> None:
    """Checks that a value can be written as UTF-8; command-line arguments can be any bytes.

    Raises:
        ConfigError: the value is not valid Unicode.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{origin}: {path} = {_abbreviate(value)}: not valid Unicode") from None


def _with_none(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with None for the word `none`, in any case, since TOML has no such value."""
    return {
        section: {name: _or_none(value) for name, value in values.items()}
        if isinstance(values, dict)
        else values
        for section, values in tree.items()
    }


def _or_none(value: object) -> object:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _read(source: str | Path) -> str:
    if isinstance(source, str) and source in recipes():
        return (importlib.resources.files("lmtrain.configs") / f"{source}.toml").read_text("utf-8")
    path = Path(source)
    if "\0" in str(source):
        raise ConfigError(f"invalid path of a configuration: {str(source)!a}")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is too large for a configuration: over {_MAX_BYTES:,} bytes")
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        similar = difflib.get_close_matches(str(source), recipes(), 1, 0.5)
        hint = f"did you mean {similar[0]}?" if similar else f"recipes: {', '.join(recipes())}"
        raise ConfigError(f"no configuration {source}: {error.strerror}", hint) from None


def assignments(pairs: Iterable[str]) -> dict[str, object]:
    """The values of `section.key=value` pairs by path; a value is TOML or a bare word.

    Raises:
        ConfigError: a pair without `=`.

    Example:
        >>> assignments(["train.seq_len=70", "model.cell=gru", "train.patience=none"])
        {'train.seq_len': 70, 'model.cell': 'gru', 'train.patience': 'none'}
    """
    values: dict[str, object] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: no value", "must be section.key=value")
        values[path.strip()] = _parse_value(text.strip())
    return values


def _parse_value(text: str) -> object:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        repr(value)  # raises for a hexadecimal number with more digits than Python converts
        return value
    except (ValueError, RecursionError):
        return text


def to_toml(config: Config) -> str:
    """The settings as TOML; a setting that is None is left out if its default is None."""
    tree, known = config.model_dump(mode="json"), settings()
    for section, values in tree.items():
        for name, value in list(values.items()):
            path = f"{section}.{name}"
            if value is None and path in known and default(path) is None:
                del values[name]
            elif value is None:
                values[name] = "none"
    return tomli_w.dumps({"format": FORMAT, **tree}, multiline_strings=False)


# Instead of pydantic's words, by its types of errors.
_REASONS = {
    "bool_parsing": "input should be true or false",
    "bool_type": "input should be true or false",
    "too_short": "input should not be empty",
}


def _describe(error: ValidationError) -> list[str]:
    problems = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
        if problem["type"] == "extra_forbidden":
            problems.append(_unknown_setting(path))
        elif problem["type"] == "value_error":
            for text in str(problem["ctx"]["error"]).split("; "):
                is_unknown = text.startswith(UNKNOWN)
                problems.append(
                    _unknown_setting(text.removeprefix(UNKNOWN)) if is_unknown else text
                )
        else:
            reason = _REASONS.get(problem["type"], problem["msg"].lower())
            problems.append(f"{path} = {_abbreviate(problem['input'])}: {reason}")
    return problems


def _message_lines(problems: list[str], origin: str) -> list[str]:
    if len(problems) == 1:
        return [f"{origin}: {problems[0]}"]
    return [f"{origin}: {len(problems)} invalid settings", problems[0], "; ".join(problems[1:])]


def _abbreviate(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_setting(path: str) -> str:
    return f"{UNKNOWN}{path!r}{_suggestion(path)}"


def _suggestion(path: str) -> str:
    known = [name for name in (*settings(), *Config.model_fields) if name != path]
    last = path.rpartition(".")[2]
    similar = [name for name in known if name.rpartition(".")[2] == last]
    similar = similar or difflib.get_close_matches(path, known, 1, 0.5)
    return f": did you mean {similar[0]!r}?" if similar else ""
