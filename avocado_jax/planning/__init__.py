"""Memory and time of a run, predicted by compiling its step ahead of time without the devices."""
