"""`python -m hymba`, for launchers that start modules (torchrun, accelerate)."""

from hymba.cli import app

if __name__ == "__main__":
    app(prog_name="hymba")
