"""How the runner carries out a plan: what it works with, one stage, what follows the stages, and their cost."""
