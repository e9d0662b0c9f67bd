"""A small convolutional decoder that a residual is an output of (HNeRV, arXiv 2304.02633; ReALLM, arXiv 2405.13155)."""
