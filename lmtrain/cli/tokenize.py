"""`lmtrain tokenize`: token ids of a text, and the coverage of a vocabulary."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain import config, files, screen, untrusted
from lmtrain.cli.output import JsonOption, print_json, print_table
from lmtrain.cli.settings import SetOption, chosen_settings, setting
from lmtrain.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from lmtrain.data.tokenizer import Tokenizer
    from lmtrain.data.tokens import Tokens


def command(
    source: Annotated[
        str, typer.Argument(metavar="RUN|CORPUS", help="A run, or text to build a vocabulary from.")
    ],
    text: Annotated[
        str | None,
        typer.Argument(help="Text to tokenize; without it, the tokens of the corpus are counted."),
    ] = None,
    level: Annotated[str | None, setting("level")] = None,
    vocab_size: Annotated[int | None, setting("vocab_size")] = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Show the ids of a text, or what a vocabulary covers.

    \b
    lmtrain tokenize runs/python-docs-lstm-1 "The cat sat."
    lmtrain tokenize novel.txt --vocab-size 5000
    """
    tokenizer, own = _open(source, chosen_settings(locals(), set_ or []))
    if text is not None:
        _show_ids(tokenizer, text, json=json)
    elif own is not None:
        _show_coverage(tokenizer, own, source, json=json)
    else:
        raise CheckpointError(
            f"{source} is a run, and no text is given",
            f'try: lmtrain tokenize {source} "some text"',
        )


def _open(source: str, overrides: dict[str, object]) -> "tuple[Tokenizer, Tokens | None]":
    from lmtrain.data import corpus
    from lmtrain.data.division import Division
    from lmtrain.data.tokenizer import Tokenizer
    from lmtrain.data.tokens import read_tokens

    folder = Path(source)
    if files.is_folder(source):
        if not untrusted.exists(folder / "tokenizer.json"):
            if any(untrusted.exists(folder / name) for name in ("vectors.json", "frames.json")):
                raise ConfigError(f"{source} was trained on vectors: it has no tokenizer")
            raise CheckpointError(f"{source} is not a run: it has no tokenizer.json")
        if overrides:
            raise ConfigError(
                f"{source} is a run and has a tokenizer: {min(overrides)} cannot be set"
            )
        return Tokenizer.from_json(untrusted.text(folder / "tokenizer.json")), None
    data = config.load(overrides={**overrides, "data.train": [source]}).data
    tokenizer, texts = read_tokens(Division(corpus.open_text([source])), data)
    [tokens] = texts.values()
    return tokenizer, tokens


def _show_ids(tokenizer: "Tokenizer", text: str, *, json: bool) -> None:
    ids = tokenizer.encode(text).tolist()
    unknown = ids.count(tokenizer.unk_id)
    names = [tokenizer.vocabulary[index] for index in ids]
    if json:
        print_json("lmtrain.tokenize/1", {"ids": ids, "tokens": names, "oov": unknown})
        return
    rows = [(screen.one_line(repr(name)[1:-1]), str(index)) for name, index in
            zip(names, ids, strict=True)]  # fmt: skip
    print_table([("token", "id"), *rows])
    print(f"{len(ids)} tokens, {unknown} out of vocabulary")


def _show_coverage(tokenizer: "Tokenizer", tokens: "Tokens", source: str, *, json: bool) -> None:
    unknown = 0
    if tokenizer.unk_id is not None:
        unknown = int((tokens.ids == tokenizer.unk_id).sum())
    facts: dict[str, Any] = {
        "corpus": source,
        "tokens": len(tokens),
        "characters": tokens.characters,
        "vocab_size": tokenizer.vocab_size,
        "oov": unknown,
        "oov_rate": unknown / len(tokens),
        "coverage": 1 - unknown / len(tokens),
    }
    if json:
        print_json("lmtrain.tokenize/1", facts)
        return
    print_table(
        [
            ("tokens", f"{len(tokens):,}"),
            ("characters", f"{tokens.characters:,}"),
            ("vocabulary", f"{tokenizer.vocab_size:,}"),
            ("covered", f"{100 * facts['coverage']:.2f} %"),
            ("out of vocabulary", f"{unknown:,} ({100 * facts['oov_rate']:.2f} %)"),
        ]
    )
    first = " ".join(screen.one_line(repr(token)[1:-1]) for token in tokenizer.vocabulary[:20])
    print(f"start of the vocabulary: {first}")
