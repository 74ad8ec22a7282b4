"""Hosts in native code: the computations of ``training`` for a CPU, in float32.

Axes: ``B`` environment, ``U`` update, ``M`` image of an update, ``I`` image, ``S`` slot, ``K``
class. ``images.hpp``, ``seeds.hpp`` and ``hosts.hpp`` have the code, which is compiled once for all
architectures.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from esper_lightning.compiling.native.library import build_library
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.core.shapes import Float, Int
from esper_lightning.core.tensor_trees import leaves
from esper_lightning.envs.morphogenesis.host import Architecture
from esper_lightning.envs.morphogenesis.lifecycle import JUDGED, Slots, is_in
from esper_lightning.envs.morphogenesis.network import Weights
from esper_lightning.envs.morphogenesis.population import Traits
from esper_lightning.envs.morphogenesis.training import SGD, Measured, Trained

__all__ = ["NativeHosts"]

_HEADERS = [Path(__file__).with_name(name) for name in ("images.hpp", "seeds.hpp", "hosts.hpp")]
_ALIGNMENT = 64  # bytes
_MOST_SLOTS = 64  # as in hosts.hpp
_INTEGERS, _POINTERS = ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_void_p)


class _Task(ctypes.Structure):
    """The arguments of native code, in the order of ``Task`` in ``hosts.hpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hosts", "slots", "classes", "channels", "side")),
        *((name, _INTEGERS) for name in ("widths", "kernels", "pools")),
        ("row", ctypes.c_int64),
        ("seed_row", _INTEGERS),
        *((name, ctypes.c_void_p) for name in ("host", "host_speed")),
        *((name, _POINTERS) for name in ("seeds", "seed_speeds", "means", "variances")),
        *((name, ctypes.c_void_p) for name in ("stage", "blueprint", "alpha")),
        *((name, ctypes.c_void_p) for name in ("present", "used", "image", "label", "index")),
        *((name, ctypes.c_int64) for name in ("updates", "images")),
        ("learning_rate", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("momentum", "weight_decay", "max_grad_norm")),
        *((name, ctypes.c_void_p) for name in ("finite", "grad_norm")),
        ("switches", ctypes.c_uint8),
        *((name, ctypes.c_void_p) for name in ("loss", "accuracy", "contribution", "work")),
        *((name, ctypes.c_int64) for name in ("work_bytes", "next")),
    )


class NativeHosts:
    """Trains and measures hosts on a CPU in float32, one after another on each thread.

    The arithmetic of a host is the same bits whatever hosts are beside it.

    Args:
        architecture: Layers of the hosts.
        sgd: Settings of SGD.

    Raises:
        UnsupportedError: If the code cannot be compiled, or a host has too many blocks for it.
    """

    def __init__(self, architecture: Architecture, sgd: SGD) -> None:
        if architecture.slots > _MOST_SLOTS:
            raise UnsupportedError(f"a host of more than {_MOST_SLOTS} blocks")
        # Hosts are no code of users: sums of products may be rounded once.
        text = "\n".join(header.read_text() for header in _HEADERS)
        library = build_library(text, "-ffp-contract=fast")
        self._run, self._work_bytes = library.run, library.work_bytes
        self._run.argtypes, self._run.restype = [ctypes.POINTER(_Task), ctypes.c_int], None
        self._work_bytes.argtypes = [ctypes.POINTER(_Task)]
        self._work_bytes.restype = ctypes.c_int64
        self._architecture, self._sgd = architecture, sgd
        self._work = torch.empty(0, dtype=torch.uint8)

    def train(
        self,
        weights: Weights,
        velocity: Weights,
        slots: Slots,
        image: Float[Tensor, "I H W C"],
        label: Int[Tensor, "B U M"],
        index: Int[Tensor, "B U M"],
        traits: Traits,
    ) -> Trained:
        """One epoch of ``U`` updates on the images ``index``; writes into weights and velocity."""
        finite = torch.empty(len(index), dtype=torch.bool)
        norm = torch.empty_like(slots.alpha)
        kept = [image.contiguous(), label.contiguous(), index.contiguous()]
        self._call(
            weights,
            velocity,
            slots,
            kept,
            traits,
            updates=index.shape[1],
            images=index.shape[2],
            finite=finite.data_ptr(),
            grad_norm=norm.data_ptr(),
        )
        return Trained(finite, norm)

    def measure(
        self,
        weights: Weights,
        slots: Slots,
        image: Float[Tensor, "I H W C"],
        label: Int[Tensor, " I"],
        traits: Traits,
        *,
        switch: bool = True,
    ) -> Measured:
        """Loss and accuracy on given images and, with ``switch``, the contribution of each slot.

        Images of a class that does not occur do not count.
        """
        loss = torch.empty(len(slots.stage))
        accuracy = torch.empty_like(loss)
        contribution = torch.empty_like(slots.alpha)
        self._call(
            weights,
            weights,
            slots,
            [image.contiguous(), label.contiguous()],
            traits,
            updates=1,
            images=len(label),
            switches=switch,
            loss=loss.data_ptr(),
            accuracy=accuracy.data_ptr(),
            contribution=contribution.data_ptr(),
        )
        return Measured(loss, accuracy, contribution, is_in(slots.stage, JUDGED))

    def _call(
        self,
        weights: Weights,
        velocity: Weights,
        slots: Slots,
        data: Sequence[Tensor],
        traits: Traits,
        **others: int,
    ) -> None:
        architecture, sgd = self._architecture, self._sgd
        count = architecture.slots
        for tensor in leaves((weights, velocity)):
            assert tensor.is_contiguous(), "native code writes in place"
            assert tensor.dtype == torch.float32
        read = [*slots[:3], *traits]
        kept = [tensor.contiguous() for tensor in read]  # until the end
        stage, blueprint, alpha, learning_rate, class_mask, channels_used = kept
        task = _Task(
            hosts=len(stage),
            slots=count,
            classes=architecture.classes,
            channels=architecture.image[0],
            side=architecture.image[1],
            widths=_integers(architecture.channels),
            kernels=_integers(architecture.kernels),
            pools=_integers(architecture.pools),
            row=weights.host.shape[1],
            seed_row=_integers([seed.shape[1] for seed in weights.seeds]),
            host=weights.host.data_ptr(),
            host_speed=velocity.host.data_ptr(),
            seeds=_pointers(weights.seeds),
            seed_speeds=_pointers(velocity.seeds),
            means=_pointers(weights.means),
            variances=_pointers(weights.variances),
            stage=stage.data_ptr(),
            blueprint=blueprint.data_ptr(),
            alpha=alpha.data_ptr(),
            present=class_mask.data_ptr(),
            used=channels_used.data_ptr(),
            image=data[0].data_ptr(),
            label=data[1].data_ptr(),
            index=data[2].data_ptr() if len(data) > 2 else None,
            learning_rate=learning_rate.data_ptr(),
            momentum=sgd.momentum,
            weight_decay=sgd.weight_decay,
            max_grad_norm=sgd.max_grad_norm,
            **others,
        )
        threads = min(torch.get_num_threads(), len(stage))
        task.work_bytes = -(-self._work_bytes(task) // _ALIGNMENT) * _ALIGNMENT
        size = threads * task.work_bytes + _ALIGNMENT
        if self._work.numel() < size:
            self._work = torch.empty(size, dtype=torch.uint8)
        task.work = -(-self._work.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self._run(task, threads)


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
