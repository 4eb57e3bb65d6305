"""One copy of what two models have in common; a switch loads and frees the difference, and nothing leaks."""

import gc
import threading
import time
import tracemalloc
import weakref
from dataclasses import replace

import pytest
import tiny
import torch

import ditkit
from ditkit.errors import SetupError
from ditkit.shared import Holder, Shared, Switch, nbytes, switch


def size(module):
    return sum(p.numel() * p.element_size() for p in (*module.parameters(), *module.buffers()))


def held_by(library):
    return nbytes(list(library.shared._alive.values()))


class Library:
    """Makes real tiny components and counts how often."""

    def __init__(self):
        self.shared, self.made = Shared(), []

    def part(self, key, make):
        def build():
            self.made.append(key)
            return make()

        return (lambda: key), build

    def holder(self, transformer_seed):
        return Holder(
            self.shared,
            {
                "vae": self.part("vae 2", tiny.vae),
                "transformer": self.part(f"transformer {transformer_seed}", lambda: tiny.transformer(transformer_seed)),
            },
        )


def test_two_models_hold_one_copy_of_what_is_equal():
    library = Library()
    one, two = library.holder(1), library.holder(5)
    assert one["vae"] is two["vae"]
    assert one["transformer"] is not two["transformer"]
    assert sorted(library.made) == ["transformer 1", "transformer 5", "vae 2"]
    expected = size(one["vae"]) + size(one["transformer"]) + size(two["transformer"])
    assert held_by(library) == expected


def test_nothing_is_loaded_before_it_is_asked_for():
    library = Library()
    holder = library.holder(1)
    assert (list(holder), len(holder), holder.loaded, library.made) == (["vae", "transformer"], 2, {}, [])
    with pytest.raises(KeyError):
        holder["nothing"]


@pytest.mark.slow
def test_the_last_holder_frees_a_component_and_no_other():
    library = Library()
    one, two = library.holder(1), library.holder(1)
    watch = weakref.ref(one["vae"])
    assert two["vae"] is watch()
    one.drop()
    gc.collect()
    assert watch() is not None
    del two
    gc.collect()
    assert watch() is None
    assert held_by(library) == 0
    assert one["vae"] is not None  # loaded anew
    assert library.made == ["vae 2", "vae 2"]


def test_a_switch_loads_and_frees_the_difference_only():
    library = Library()
    old, new = library.holder(1), library.holder(5)
    vae, gone = old["vae"], weakref.ref(old["transformer"])
    numbers = size(vae), size(old["transformer"])
    report = switch(old, new)
    assert gone() is None
    assert new["vae"] is vae
    assert library.made == ["vae 2", "transformer 1", "transformer 5"]
    assert report == Switch({"vae": numbers[0]}, {"transformer": numbers[1]}, {"transformer": numbers[1]}, {})
    assert held_by(library) == sum(numbers)
    assert f"kept {numbers[0]:,} bytes (vae {numbers[0]:,}); freed {numbers[1]:,} bytes" in str(report)


def test_a_switch_whose_loading_fails_leaves_both_models_usable():
    library = Library()
    old = library.holder(1)
    dict(old)

    def fail():
        raise OSError("the file is gone")

    new = Holder(library.shared, {"vae": library.part("vae 2", tiny.vae), "transformer": (lambda: "x", fail)})
    with pytest.raises(OSError, match="gone"):
        switch(old, new)
    assert old["vae"] is new["vae"]
    assert old["transformer"] is not None


@pytest.mark.slow
def test_a_switch_frees_before_it_loads():
    """The peak is one transformer, not two."""
    library = Library()
    old = library.holder(1)
    old["transformer"]
    alive = []

    def make():
        gc.collect()
        alive.append("transformer 1" in library.shared)
        return tiny.transformer(5)

    switch(old, Holder(library.shared, {"transformer": (lambda: "transformer 5", make)}))
    assert alive == [False]


def test_a_component_under_another_name_is_kept_too():
    """The second expert of one model can be the only transformer of another."""
    library = Library()
    old, new = Holder(library.shared, {"transformer_2": library.part("t", tiny.transformer)}), None
    part = old["transformer_2"]
    new = Holder(library.shared, {"transformer": library.part("t", tiny.transformer)})
    report = switch(old, new)
    assert new["transformer"] is part
    assert (report.kept, report.freed, report.loaded) == ({"transformer": size(part)}, {}, {})


@pytest.mark.slow
def test_a_component_that_somebody_else_holds_is_said_not_to_be_freed():
    library = Library()
    old, third, new = library.holder(1), library.holder(1), library.holder(5)
    dict(old)
    third["transformer"]
    report = switch(old, new)
    assert report.freed == {}
    assert report.still_held == {"transformer": size(third["transformer"])}
    back = switch(new, old)
    assert back.loaded == {}
    assert set(back.kept) == {"vae", "transformer"}


def test_models_that_share_nothing_cannot_be_switched(tiny_model):
    with pytest.raises(SetupError, match="the two share nothing"):
        ditkit.switch(ditkit.load(tiny_model), ditkit.load(tiny_model))


def test_threads_make_a_component_once_and_different_ones_at_the_same_time():
    shared, made, together = Shared(), [], threading.Barrier(2, timeout=10)

    def make(key):
        made.append(key)
        together.wait()  # passes only if two keys are made at once
        return tiny.vae()

    found = {}

    def ask(n):
        key = "ab"[n % 2]
        found[n] = shared.get(key, lambda: make(key))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == ["a", "b"]
    assert len({id(found[n]) for n in range(16)}) == 2


def test_threads_of_one_holder_get_one_object():
    library = Library()
    holder, found = library.holder(1), []

    def slow():
        time.sleep(0.05)
        return tiny.vae()

    holder = Holder(library.shared, {"vae": (lambda: "v", slow)})
    threads = [threading.Thread(target=lambda: found.append(holder["vae"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(part) for part in found}) == 1


def test_a_failure_is_not_remembered():
    shared = Shared()
    with pytest.raises(OSError, match="gone"):
        shared.get("k", lambda: (_ for _ in ()).throw(OSError("gone")))
    part = shared.get("k", tiny.vae)
    assert shared.get("k", tiny.vae) is part


@pytest.mark.slow
def test_switching_back_and_forth_leaks_nothing():
    gc.freeze()  # objects of other tests: to look at them again and again takes minutes
    library = Library()
    holders = [library.holder(1), library.holder(5)]
    dict(holders[0])
    switch(*holders)
    switch(*reversed(holders))
    tracemalloc.start()
    models = sum(isinstance(o, tiny.WanTransformer) for o in gc.get_objects())
    before, held = tracemalloc.get_traced_memory()[0], held_by(library)
    for _ in range(10):
        switch(*holders)
        switch(*reversed(holders))
    gc.collect()
    assert held_by(library) == held
    assert tracemalloc.get_traced_memory()[0] - before < 200_000
    tracemalloc.stop()
    assert sum(isinstance(o, tiny.WanTransformer) for o in gc.get_objects()) == models
    gc.unfreeze()


def test_memory_that_is_shared_counts_once_and_meta_tensors_not():
    linear = torch.nn.Linear(8, 8, bias=False)
    tied = torch.nn.Linear(8, 8, bias=False)
    tied.weight = torch.nn.Parameter(linear.weight.data)  # another tensor on the same memory
    assert nbytes([linear]) == nbytes([linear, tied]) == 256
    with torch.device("meta"):
        assert nbytes([torch.nn.Linear(8, 8)]) == 0
    assert nbytes(["a tokenizer"]) == 0
    assert nbytes([tiny.transformer(config=replace(tiny.TRANSFORMER, num_layers=1))]) > 0
