"""The searchers. Each is a recipe whose `start` returns an ask/tell search; `nas.testing.check_searcher` states its laws."""
