"""From a decoder and token windows to a trained run: the Lightning module, optimisers, schedules, budgets, callbacks."""
