"""The command line: `main.py` parses and turns failures into exit codes; a module per command."""
