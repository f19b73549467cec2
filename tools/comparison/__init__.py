"""Compare optimizers, or recipes: candidates, search, store of results, runner, worker, page, and the command."""
