"""`lmtrain predict`: what a model predicts for data."""

from typing import Annotated

import typer

from lmtrain.cli.loading import DeviceOption, RunArgument, load_for
from lmtrain.cli.output import JsonOption, print_json, shown


def command(
    run: RunArgument,
    file: Annotated[
        str, typer.Argument(help="A file, one text a line; - for standard input.")
    ] = "-",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Print what a model predicts for each text: its label, or a tag for each token.

    \b
    lmtrain predict runs/reviews-lstm-1 new.txt          label, text, probability
    lmtrain predict runs/slots dev.conll                 token, tag
    echo "play some jazz" | lmtrain predict runs/snips --json
    """
    model = load_for("predict", run, device)
    for prediction in model.predict(model.inputs(file)):
        if json:
            print_json("lmtrain.predict/1", prediction.fields(), indent=None)
        else:
            print(shown(prediction.line()))
