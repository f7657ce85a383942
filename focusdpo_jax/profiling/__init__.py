"""Cost of programs: floating-point operations, collectives, and the compiler's time estimates."""
