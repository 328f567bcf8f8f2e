"""Settings read and written: recipes, TOML files, `--set`.

Defaults < configuration file < `--set` < named options. Every problem is reported at once, before
torch is imported. Below the API no code sees the tree: it is turned into plain arguments there.
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
_MAX_BYTES = 1_000_000


def recipes() -> list[str]:
    """Names of the recipes that come with lmtrain."""
    return sorted(_recipe_names())


def _recipe_names() -> Iterator[str]:
    for entry in importlib.resources.files("lmtrain.configs").iterdir():
        if entry.name.endswith(".toml"):
            yield entry.name.removesuffix(".toml")


def load(source: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """The settings of a recipe or TOML file, or the defaults, with `overrides` on top.

    Args:
        source: name of a recipe that comes with lmtrain, or a path; None for the defaults.
        overrides: values by path, such as {"train.seq_len": 70}.

    Raises:
        ConfigError: the file is missing or not TOML, or a setting is unknown or impossible.

    Example:
        >>> load(overrides={"train.seq_len": 70}).train.seq_len
        70
    """
    return parse("" if source is None else _read(source), str(source or "options"), overrides)


def parse(text: str, origin: str, overrides: Mapping[str, object] | None = None) -> Config:
    """The settings that a TOML text holds, with `overrides` on top.

    Args:
        text: the TOML text.
        origin: where it came from, for the message.
        overrides: values by path.

    Raises:
        ConfigError: not TOML, a newer format, or a setting that is unknown or impossible.
    """
    try:
        tree: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # ValueError: not TOML, or a number of more digits than Python reads.
        raise ConfigError(f"{origin} is not valid TOML: {error}") from None
    written = tree.pop("format", FORMAT)
    if written != FORMAT:
        raise ConfigError(
            f"{origin} has configuration format {written!r}", f"this lmtrain reads {FORMAT}"
        )
    for path, value in (overrides or {}).items():
        section, dot, name = path.partition(".")
        part = tree.setdefault(section, {})
        if not dot or not isinstance(part, dict):
            raise ConfigError(_unknown(path))
        _require_unicode(path, value, origin)
        part[name] = value
    try:
        return Config.model_validate(_with_none(tree))
    except ValidationError as error:
        # The tree as a whole is only checked where all sections are right.
        unknown = [_unknown(f"model.{name}") for name in unknown_options(tree.get("model"))]
        problems = list(dict.fromkeys([*unknown, *_explained(error)]))
        raise ConfigError(*_message(problems, origin)) from None


def _require_unicode(path: str, value: object, origin: str) -> None:
    """Checks that a setting can be written; a name on the command line may be any bytes.

    Raises:
        ConfigError: it cannot.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{origin}: {path} = {_shown(value)}: not valid Unicode") from None


def _with_none(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the word none, in any case, for what TOML has no value for."""
    return {
        section: {name: _or_none(value) for name, value in part.items()}
        if isinstance(part, dict)
        else part
        for section, part in tree.items()
    }


def _or_none(value: object) -> object:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _read(source: str | Path) -> str:
    if isinstance(source, str) and source in recipes():
        return (importlib.resources.files("lmtrain.configs") / f"{source}.toml").read_text("utf-8")
    path = Path(source)
    if "\0" in str(source):
        raise ConfigError(f"no configuration can be called {str(source)!a}")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is no configuration: it is over {_MAX_BYTES:,} bytes")
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        near = difflib.get_close_matches(str(source), recipes(), 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(recipes())}"
        raise ConfigError(f"no configuration {source}: {error.strerror}", hint) from None


def assignments(pairs: Iterable[str]) -> dict[str, object]:
    """The values by path that `section.key=value` texts give, values as in TOML or bare words.

    Raises:
        ConfigError: a text without `=`.

    Example:
        >>> assignments(["train.seq_len=70", "model.cell=gru", "train.patience=none"])
        {'train.seq_len': 70, 'model.cell': 'gru', 'train.patience': 'none'}
    """
    values: dict[str, object] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: no value", "write it as section.key=value")
        values[path.strip()] = _value(text.strip())
    return values


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def to_toml(config: Config) -> str:
    """The resolved settings as TOML; a setting that is None is left out, as its default is None."""
    tree, known = config.model_dump(mode="json"), settings()
    for section, part in tree.items():
        for name, value in list(part.items()):
            path = f"{section}.{name}"
            if value is None and path in known and default(path) is None:
                del part[name]
            elif value is None:
                part[name] = "none"
    return tomli_w.dumps({"format": FORMAT, **tree}, multiline_strings=False)


def _explained(error: ValidationError) -> list[str]:
    problems = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
        if problem["type"] == "extra_forbidden":
            problems.append(_unknown(path))
        elif problem["type"] == "value_error":
            for text in str(problem["ctx"]["error"]).split("; "):
                is_unknown = text.startswith(UNKNOWN)
                problems.append(_unknown(text.removeprefix(UNKNOWN)) if is_unknown else text)
        else:
            problems.append(f"{path} = {_shown(problem['input'])}: {problem['msg'].lower()}")
    return problems


def _message(problems: list[str], origin: str) -> list[str]:
    if len(problems) == 1:
        return [f"{origin}: {problems[0]}"]
    return [f"{origin}: {len(problems)} settings are wrong", problems[0], "; ".join(problems[1:])]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(path: str) -> str:
    return f"{UNKNOWN}{path!r}{_nearest(path)}"


def _nearest(path: str) -> str:
    known = [name for name in (*settings(), *Config.model_fields) if name != path]
    last = path.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(path, known, 1, 0.5)
    return f": did you mean {near[0]!r}?" if near else ""
