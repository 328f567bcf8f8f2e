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
    """Print the predicted label of each text, the text, and the label's probability.

    \b
    lmtrain predict runs/reviews-lstm-1 new.txt
    echo "play some jazz" | lmtrain predict runs/snips --json
    """
    model = load_for("predict", run, device)
    from lmtrain.data import labelled

    for prediction in model.predict(labelled.read_texts(file)):
        if json:
            print_json("lmtrain.predict/1", prediction.fields(), indent=None)
        else:
            print(shown(prediction.line()))
