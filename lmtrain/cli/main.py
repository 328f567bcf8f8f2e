"""The command line: its commands, and errors as a message with an exit code."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import NoReturn

import typer

import lmtrain
from lmtrain import files, screen, torchrun
from lmtrain.cli import (
    corpora,
    evaluate,
    find_lr,
    gradients,
    info,
    predict,
    sample,
    score,
    sweep,
    tokenize,
    train,
    tune,
    verify,
)
from lmtrain.cli.loading import CellsOption, load_cells
from lmtrain.cli.output import exit_quietly_on_broken_pipe, use_utf8
from lmtrain.errors import (
    ConfigError,
    LmtrainError,
    MachineError,
    RunInterruptedError,
    map_out_of_memory,
)

app = typer.Typer(
    name="lmtrain",
    help="Trains recurrent neural networks on text and other sequences, and uses them.",
    epilog="Start with: lmtrain train",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for module in (
    train, find_lr, sweep, sample, predict, evaluate, tune, score, gradients, tokenize, corpora,
    info, verify,
):  # fmt: skip
    name = module.__name__.rpartition(".")[2].replace("_", "-")
    if isinstance(module.command, typer.Typer):
        app.add_typer(module.command, name=name)
    else:
        app.command(name)(module.command)


# What typer raises for a wrong command line; it has no public name of its own.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[2]


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print(f"lmtrain {lmtrain.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
    cells: CellsOption = None,
) -> None:
    for path in cells or ():
        load_cells(path)
    if context.invoked_subcommand is None:
        print(context.get_help())
    elif context.invoked_subcommand != "train":
        # Training goes on after its terminal has closed.
        exit_quietly_on_broken_pipe()


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    raise RunInterruptedError(number, "interrupted")


def _report_thread_failure(failure: threading.ExceptHookArgs) -> None:
    # TensorBoard raises an OSError of its writer thread again in the thread that logs.
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _open_standard_streams() -> None:
    """Opens closed standard streams on the null device, so that no other file gets their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w")


def main() -> None:
    """Runs the command line and exits with its exit code."""
    code = _run()
    if torchrun.is_worker():
        _exit_without_finalizing(code)
    sys.exit(code)


def _exit_without_finalizing(code: int) -> NoReturn:
    """Exits without finalizing the interpreter.

    A thread of gloo may still hold tensors. If it waits for the interpreter's lock while the
    interpreter is finalized, the process is aborted by SIGABRT.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _run() -> int:
    """Runs the command line and returns its exit code."""
    _open_standard_streams()
    use_utf8()
    threading.excepthook = _report_thread_failure
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Signals that nohup or a shell's & ignores stay ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_interrupted)
    # SIGUSR1 asks training for a checkpoint; before training there is nothing to save.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with map_out_of_memory("try: a smaller --batch-size"):
            code: int | None = app(standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except _UsageError as error:
        screen.note(f"error: {screen.one_line(error.format_message())}")
        return ConfigError.exit_code
    except LmtrainError as error:
        prefix = "" if isinstance(error, RunInterruptedError) else "error: "
        if not error.is_reported:
            screen.note(f"{prefix}{error}")
        return error.exit_code
    except OSError as error:
        if error.filename is not None:
            return _report_bug(error)
        # Errors of named files are MachineErrors already: this is standard output.
        _discard_stdout()
        screen.note(f"error: could not write the results: {error.strerror}")
        return MachineError.exit_code
    except Exception as error:  # noqa: BLE001  # the one place where a bug becomes a message
        return _report_bug(error)


def _report_bug(error: Exception) -> int:
    trace = traceback.format_exc()
    screen.note(f"error: a bug in lmtrain: {screen.one_line(repr(error))}")
    try:
        log = files.cache_folder() / "crash.log"
        files.write(log, trace.encode(errors="backslashreplace"))
    except MachineError:
        screen.note(trace)
    else:
        screen.note(f"  the traceback is in {log}")
    return 1


def _discard_stdout() -> None:
    """Redirects standard output to the null device, so that Python does not write to it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
