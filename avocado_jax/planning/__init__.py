"""What a run would take of its devices, found by compiling its step ahead of time; no device is needed."""
