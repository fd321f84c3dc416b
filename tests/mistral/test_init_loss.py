"""The loss on Russian right after initialisation, on a small model trained for a minute: means of old pieces win."""

from pathlib import Path

import pytest

from benchmarks import mistral_init_loss


@pytest.mark.slow
def test_means_of_old_pieces_are_better_than_random_and_than_the_plain_mean(tmp_path: Path) -> None:
    losses = {name: nats[0] for name, nats in mistral_init_loss.compare(tmp_path, 1.5, 6000).items()}
    for method in ("mean", "weighted_mean"):
        assert losses[method] < losses["random"]
        assert losses[method] < losses["normal"]
