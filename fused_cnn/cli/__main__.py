"""`python -m fused_cnn.cli`: the command line where the package is not installed."""

from . import main

main()
