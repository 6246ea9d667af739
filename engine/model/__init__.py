"""The trained network beside the frozen one: connections, taps, side layers, and both as one causal language model."""
