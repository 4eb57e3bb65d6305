"""What tests of places share: listeners that act at a step, and what it means that two States are the same."""

from __future__ import annotations


def same(state, whole):
    return state.equal(whole) and state.fingerprints == whole.fingerprints


def at_step(index, act):
    """A listener that acts once."""
    done = []

    def listener(event):
        if event.name == "step.end" and event["step"].index == index and not done:
            done.append(True)
            act()

    return listener
