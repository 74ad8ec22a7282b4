"""The file of TensorBoard's events can be replaced without the loss of an event."""

import io

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from esper_lightning.callbacks.tensorboard_internals import OneEvent, event_file, replace_event_file


def test_later_events_go_into_the_new_object(tmp_path):
    experiment = SummaryWriter(tmp_path)
    experiment.add_scalar("earlier", 1.0)
    (file,) = tmp_path.iterdir()
    assert event_file(experiment) == str(file)
    contents = []

    def replace(path):
        contents.append(path.read_bytes())
        return io.BytesIO()

    new = replace_event_file(experiment, replace)
    experiment.add_scalar("later", 2.0)
    experiment.flush()
    assert b"earlier" in contents[0]
    assert b"later" in new.getvalue()
    assert file.read_bytes() == contents[0]
    experiment.close()


def test_what_is_no_experiment_of_tensorboard_has_no_such_file():
    with pytest.raises(AttributeError):
        replace_event_file(object(), open)


def test_scalars_of_a_step_are_one_event_and_each_is_what_it_would_be_alone(tmp_path):
    experiment = SummaryWriter(tmp_path)
    event = OneEvent(experiment)
    assert (event.suits(experiment), event.suits(event)) == (True, False)
    event.add_scalar("a", 1.5, 3)
    event.add_scalar("b", torch.tensor(float("nan")), 3)
    event.add_scalar("alone", 4.0, 3, 17.0)  # with a time of its own
    event.add_scalar("c", 2, 4)
    event.add_text("others", "as before", 4)
    with pytest.raises(AssertionError, match="one element"):
        event.add_scalar("d", torch.zeros(2), 4)
    event.write()
    event.write()
    experiment.close()
    (file,) = tmp_path.iterdir()
    events = [event for event in EventFileLoader(str(file)).Load() if event.summary.value]
    found = {tuple(value.tag for value in event.summary.value): event.step for event in events}
    assert found == {("alone",): 3, ("a", "b"): 3, ("others/text_summary",): 4, ("c",): 4}
