"""The recurrent cells, one equation per file, and the registry of their names."""

from lmtrain.cells.base import (
    Cell,
    CellState,
    DifferentiatedCell,
    Weights,
    cell_class,
    cell_names,
    check_argument,
    create,
    product_over_time,
    register,
    split_name,
)
from lmtrain.cells.gru import GRU
from lmtrain.cells.loading import load_file
from lmtrain.cells.lstm import LSTM
from lmtrain.cells.peephole_lstm import PeepholeLSTM
from lmtrain.cells.rnn import RNN
from lmtrain.cells.simple_gru import SimpleGRU

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "CellState",
    "DifferentiatedCell",
    "PeepholeLSTM",
    "SimpleGRU",
    "Weights",
    "cell_class",
    "cell_names",
    "check_argument",
    "create",
    "load_file",
    "product_over_time",
    "register",
    "split_name",
]
