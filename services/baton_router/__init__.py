"""The router: both front doors, tokenisation, placement, admission and the life of a request. Imports no torch."""
