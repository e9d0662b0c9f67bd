"""One job on several processes: who starts them, what rank 0 and the others say to each other, and what ends them all."""
