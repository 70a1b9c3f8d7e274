"""`python -m polyadapt` and the `polyadapt` command."""

from polyadapt.cli import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
