"""From a decoder and token windows to a trained run: Lightning module, optimisers, schedules, callbacks."""
