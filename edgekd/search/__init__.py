"""What could be built (`space`), what of it nothing else beats (`pareto`), and which student to train first (`proposer`)."""
