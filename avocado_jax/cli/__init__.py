"""One file per command: `add_arguments(parser)` declares its options, `run(args)` executes it and returns the status."""
