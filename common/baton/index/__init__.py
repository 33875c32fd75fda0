"""Which worker owns which prefix block: the contract, in memory and in Redis."""
