"""`python -m lmtrain`."""

from lmtrain.cli.main import main

main()
