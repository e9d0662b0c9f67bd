"""When and where the stages of a job run, and on which data."""
