"""The command line: its arguments, its commands and the list of jobs. Answers without torch where no model is needed."""
