"""`python -m taskgraph.cli` is the command `taskgraph`."""

from taskgraph.cli.main import main

main()
