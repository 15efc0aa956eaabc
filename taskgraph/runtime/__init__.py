"""Execute: a Plan becomes an Executable on a backend."""
