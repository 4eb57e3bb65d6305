"""What tests of places share: listeners that act at a step, what it means that two States are the same, and that the
spans of a run are whole."""

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


def check_spans(heard):
    """Every span has one end, after its beginning and inside of its parent. Returns parent and name by id."""
    parent, name, ended = {0: 0}, {0: ""}, set()
    for event in heard:
        assert event.parent in parent
        assert event.parent not in ended
        if event.name.endswith(".start"):
            assert event.span not in parent
            parent[event.span], name[event.span] = event.parent, event.name.removesuffix(".start")
        elif event.span:
            assert event.span not in ended
            assert event.name in (f"{name[event.span]}.end", f"{name[event.span]}.fail")
            ended.add(event.span)
    assert ended == {*parent} - {0}
    return parent, name
