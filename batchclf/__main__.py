"""`python -m batchclf` is the console script."""

from batchclf.cli import main

main()
