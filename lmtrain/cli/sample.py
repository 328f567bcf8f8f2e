"""`lmtrain sample`: novel text."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lmtrain import files, screen
from lmtrain.cli.loading import DeviceOption, RunArgument, load_with
from lmtrain.cli.output import JsonOption, print_json, shown
from lmtrain.errors import ConfigError

_MOST_UNKNOWN = 5


def command(
    run: RunArgument,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            help="A file with the text to continue, without its last newline; - for standard "
            "input.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Label of the text, for models trained with labels.", show_default=False),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Number of samples.")] = 1,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens of a sample, or steps of music.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; lower values make likely tokens more likely.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most likely tokens whose probabilities sum to this, 0 to 1."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="A text ends before the first occurrence of this string after the prompt; may be "
            "repeated.",
            metavar="STRING",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same sample.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write music into this file: MIDI (.mid), a picture (.png) or arrays (.npz).",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Sample text or music from a trained model.

    A word model ends a text at the end of a line; other texts end at --stop or after --max-tokens.

    \b
    lmtrain sample runs/python-docs-lstm-1 --num 5
    lmtrain sample runs/plays --prompt "ROMEO:" --temperature 0.8 --max-tokens 500
    lmtrain sample runs/plays --prompt-file scene.txt --stop "JULIET:" --temperature 0
    lmtrain sample runs/names --label Russian --num 10
    lmtrain sample runs/chorales --out tune.mid
    """
    if out:
        texts_only = (prompt, prompt_file, label, top_k, top_p, stop)
        if num > 1 or json or any(each is not None for each in texts_only):
            raise ConfigError(
                "--out writes one sample of music: only --max-tokens, --temperature, --seed and"
                " --device apply"
            )
        _write_music(run, out, device, max_tokens, temperature, seed)
        return
    prompt = _prompt(prompt, prompt_file)
    model = load_with("stream", run, device, feature="sampling text")
    if label is not None and not model.config.data.labelled:
        raise ConfigError(f"{run} was trained without labels: it has no --label")
    pieces = model.stream(
        prompt,
        **({} if label is None else {"label": label}),
        num=num,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
    )
    if unknown := model.data.tokenizer.unknown(prompt):
        names = screen.join_names(unknown, _MOST_UNKNOWN)
        screen.note(f"not in the vocabulary of the model: {names}")
    if num == 1 and not json:
        for _, piece in pieces:
            _write(piece)
        _write("\n")
        return
    texts = [""] * num
    for row, piece in pieces:
        texts[row] += piece
    if json:
        for index, text in enumerate(texts):
            print_json("lmtrain.sample/1", {"index": index, "text": text}, indent=None)
        return
    separator = "\n---\n" if any("\n" in text for text in texts) else "\n"
    _write(separator.join(texts) + "\n")


def _prompt(typed: str | None, file: str | None) -> str:
    """The prompt, as it was typed or from a file.

    Raises:
        ConfigError: both are given.
        TextError: the file cannot be read as text.
    """
    if file is None:
        return typed or ""
    if typed is not None:
        raise ConfigError("--prompt cannot be combined with --prompt-file: give one of them")
    from lmtrain.data import corpus

    return "".join(corpus.open_text([file], parts=()).chunks()).removesuffix("\n")


def _write(text: str) -> None:
    sys.stdout.write(shown(text))
    sys.stdout.flush()


def _write_music(
    run: str, out: Path, device: str, num_steps: int, temperature: float, seed: int
) -> None:
    """Draws frames and writes them in the form that the name of the file asks for.

    Raises:
        ConfigError: another ending of the name, or a model of something else.
    """
    if out.suffix not in (".mid", ".png", ".npz"):
        raise ConfigError(f"--out {out}: the name of the file must end in .mid, .png or .npz")
    model = load_with("compose", run, device, feature="--out")
    from lmtrain.data import midi, vectors

    forms = {".mid": midi.midi, ".png": midi.png, ".npz": vectors.npz}
    frames = model.compose(num_steps=num_steps, temperature=temperature, seed=seed)
    files.write(out, forms[out.suffix](frames))
    print(f"{out}: {len(frames):,} steps")
