"""From noise to values: what an exported pipeline is made of."""
