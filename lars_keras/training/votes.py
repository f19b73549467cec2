"""Take decisions on all hosts after the same update."""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import keras

from lars_keras.training.cluster import Cluster


@runtime_checkable
class Voter(Protocol):
    """A callback that acts on all hosts if one of them wants it to.

    Attributes:
        agreed: True if any host wants it to act after this batch. `hold_vote` sets it.
    """

    agreed: bool | None

    def vote(self, update: int, logs: Mapping[str, float]) -> bool:
        """Return True if this host wants the callback to act after `update`, which gave these logs."""


def hold_vote(
    cluster: Cluster,
    callbacks: Iterable[keras.callbacks.Callback | Voter],
    update: int,
    logs: Mapping[str, float],
    stop: bool | None = None,
) -> bool:
    """Set `agreed` of each `Voter` among the callbacks, by one message for all of them.

    Collective: call it on every host, with the same voters in the same order.

    Args:
        cluster: cluster of the run.
        callbacks: callbacks of the run; callbacks that are not voters are ignored.
        update: the number of finished updates.
        logs: logs of the last training batch; empty in an evaluation.
        stop: True if this host wants the training to stop; None not to vote on it.

    Returns:
        True if any host wants the training to stop.
    """
    voters = [callback for callback in callbacks if isinstance(callback, Voter)]
    votes = [voter.vote(update, logs) for voter in voters]
    if stop is None and not voters:
        return False
    stop, *agreements = cluster.any_across_hosts(bool(stop), *votes)
    for voter, agreed in zip(voters, agreements, strict=True):
        voter.agreed = agreed
    return stop


def take_agreed(voter: Voter, cluster: Cluster, update: int, logs: Mapping[str, float] | None = None) -> bool:
    """Return the decision of the last vote, once. Without a vote, as in `model.fit`, hold one for this voter alone."""
    if voter.agreed is None:
        hold_vote(cluster, [voter], update, logs or {})
    agreed, voter.agreed = voter.agreed, None
    return bool(agreed)
