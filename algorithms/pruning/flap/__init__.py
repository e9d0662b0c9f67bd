"""FLAP: heads and neurons whose outputs fluctuate least are taken out, and what they gave on average is made up for."""
