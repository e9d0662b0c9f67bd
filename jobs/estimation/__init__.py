"""What a job will cost, before it runs: from shapes, from a probe of its first blocks, and what becomes of it afterwards."""
