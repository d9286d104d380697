"""The command line: thin wrappers that turn words into objects."""
