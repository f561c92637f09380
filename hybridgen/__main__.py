"""`python -m hybridgen` is the `hybridgen` command."""

from hybridgen.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
