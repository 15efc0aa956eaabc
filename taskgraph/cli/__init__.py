"""The command line: one module a command, and `main`, which assembles them."""
