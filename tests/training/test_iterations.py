"""The numbers of iterations, which Lightning takes for batches."""

from esper_lightning.training.iterations import Iterations


def test_an_epoch_has_as_many_batches_as_iterations_and_begins_anew():
    iterations = Iterations(3)
    assert len(iterations) == 3
    assert list(iterations) == list(iterations) == [0, 1, 2]


def test_nothing_of_them_is_saved():
    iterations = Iterations(3)
    next(iter(iterations))
    state = iterations.state_dict()
    assert state == {}
    iterations.load_state_dict(state)
    assert list(iterations) == [0, 1, 2]
