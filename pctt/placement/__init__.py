"""Which core of a chip holds which layer, and what that costs."""
