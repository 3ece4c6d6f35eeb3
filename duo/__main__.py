"""`python -m duo`: the same as the console script `duo`."""

from duo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
