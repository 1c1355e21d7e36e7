"""The command line: thin, over what a script does with a few lines."""
