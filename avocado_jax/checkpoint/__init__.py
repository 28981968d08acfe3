"""Parameters on disk: Hugging Face folders and Orbax runs, one tensor (one layer) in memory at a time."""
