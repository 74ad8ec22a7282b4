"""The file of TensorBoard's events can be replaced without the loss of an event."""

import io

import pytest
from torch.utils.tensorboard import SummaryWriter

from esper_lightning.callbacks.tensorboard_internals import event_file, replace_event_file


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
