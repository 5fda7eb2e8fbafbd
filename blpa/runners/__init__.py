"""The experiments: `cli` reads the command line, every other file is one task with a `run(config) -> records`."""
