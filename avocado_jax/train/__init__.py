"""Training: one step as a pure function, and the loop that feeds, measures, saves and resumes it."""
