"""`python -m qlora COMMAND`; see cli.py."""

from qlora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
