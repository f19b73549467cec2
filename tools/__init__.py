"""Programs about the package: comparison, benchmarks, proofs."""
