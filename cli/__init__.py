"""The command line of poolreg: each command is one call of the library."""
