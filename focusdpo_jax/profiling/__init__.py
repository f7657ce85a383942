"""What a program costs: floating-point operations, collectives, and a compiler's estimates of time."""
