"""One file per command: `add_arguments(parser)` declares its options, `run(args)` runs it and returns the status."""
