"""The command line: `python -m moert VERB`, or `moert VERB` where it is installed."""
