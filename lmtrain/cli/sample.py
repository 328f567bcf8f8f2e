"""`lmtrain sample`: novel text."""

import sys
from typing import Annotated

import typer

from lmtrain.cli.loading import DeviceOption, RunArgument, load_for
from lmtrain.cli.output import JsonOption, print_json, shown


def command(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Number of samples.")] = 1,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens of a sample.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(help="Above 0; lower values make likely tokens more likely.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most likely tokens that sum to this, 0 to 1."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 1,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Write novel text with a trained model.

    A word model ends a text at the end of its sentence; other texts end after --max-tokens.

    \b
    lmtrain sample runs/python-docs-lstm-1 --num 5
    lmtrain sample runs/plays --prompt "ROMEO:" --temperature 0.8 --max-tokens 500
    """
    pieces = load_for("sample", run, device).stream(
        prompt,
        num=num,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if num == 1 and not json:
        for _, piece in pieces:
            _write(piece)
        _write("\n")
        return
    texts = [""] * num
    for row, piece in pieces:
        texts[row] += piece
    for index, text in enumerate(texts):
        if json:
            print_json("lmtrain.sample/1", {"index": index, "text": text}, indent=None)
        else:
            _write(text + "\n")


def _write(text: str) -> None:
    sys.stdout.write(shown(text))
    sys.stdout.flush()
