"""The report of a job and the comparison of several: single HTML files that ask the network for nothing."""
