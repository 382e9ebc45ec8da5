"""The numerics of poolreg: pure functions of arrays, each with its equation and its reference."""
