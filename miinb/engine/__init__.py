"""What runs in a rank: loading, the fused decoder, scheduling, sampling, and the baseline to compare with."""
