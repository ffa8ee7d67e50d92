"""One module per `python -m qlora COMMAND`, with its options in options.py."""
