"""One ``nn.Module`` and its optimizers per host, and a life cycle of plain Python: the oracle.

Everything that the environment does with stacked tensors is done here for one host, the way one
would write it for one host. Nothing of the environment is used but names and initial parameters.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional


class Norm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.empty(c)), nn.Parameter(torch.empty(c))

    def forward(self, h):
        normed = functional.layer_norm(h, h.shape[1:])
        return self.scale[:, None, None] * normed + self.bias[:, None, None]


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        half = max(4, c // 2)
        self.squeeze, self.excite = nn.Linear(c, half), nn.Linear(half, c)

    def forward(self, h):
        z = self.excite(self.squeeze(h.mean((2, 3))).relu())
        return (2 * z.sigmoid() - 1)[:, :, None, None] * h

    def ordered(self):
        squeeze, excite = self.squeeze, self.excite
        return [squeeze.weight, squeeze.bias, excite.weight, excite.bias]


class Convolutional(nn.Module):
    """``scale * relu(last(...))``, where the layers before ``last`` differ."""

    def __init__(self, name, c):
        super().__init__()
        self.name = name
        quarter = max(4, c // 4)
        self.scale, self.bias = nn.Parameter(torch.empty(c)), nn.Parameter(torch.empty(c))
        conv = lambda i, o, k, **more: nn.Conv2d(i, o, k, padding=k // 2, **more)  # noqa: E731
        if name == "depthwise":
            self.depth = conv(c, c, 3, groups=c, bias=False)
            self.point = conv(c, c, 1, bias=False)
        elif name == "conv_light":
            self.kernel = conv(c, c, 3, bias=False)
        elif name == "low_rank":
            self.basis = conv(c, quarter, 3, bias=False)
            self.mix = conv(quarter, c, 1, bias=False)
        elif name == "conv_heavy":
            self.inner, self.kernel = conv(c, c, 3), conv(c, c, 3, bias=False)
        elif name == "bottleneck":
            self.inner, self.kernel = conv(c, quarter, 1), conv(quarter, c, 3, bias=False)

    def forward(self, h):
        if self.name == "depthwise":
            h = self.point(self.depth(h))
        elif self.name == "low_rank":
            h = self.mix(self.basis(h))
        elif self.name == "conv_light":
            h = self.kernel(h)
        else:
            h = self.kernel(self.inner(h).relu())
        return self.scale[:, None, None] * (h + self.bias[:, None, None]).relu()

    def ordered(self):
        rest = {
            "depthwise": lambda: [self.depth.weight, self.point.weight],
            "conv_light": lambda: [self.kernel.weight],
            "low_rank": lambda: [self.basis.weight, self.mix.weight],
            "conv_heavy": lambda: [self.inner.weight, self.inner.bias, self.kernel.weight],
            "bottleneck": lambda: [self.inner.weight, self.inner.bias, self.kernel.weight],
        }[self.name]()
        return [self.bias, self.scale, *rest]


def norm_of(grads):
    return math.sqrt(sum(grad.square().sum().item() for grad in grads))


def make_seed(name, channels):
    if name == "norm":
        return Norm(channels)
    if name == "attention":
        return Attention(channels)
    return Convolutional(name, channels)


def ordered(seed):
    return seed.ordered() if hasattr(seed, "ordered") else [seed.scale, seed.bias]


def fill(parameters, row):
    """Copy the first entries of a row into parameters."""
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(row[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()


class Host(nn.Module):
    """A host; ``kind`` has its classes, and the number of channels that it uses in each block."""

    def __init__(self, architecture, kind=None):
        super().__init__()
        self.kind = kind
        inputs = (architecture.image[0], *architecture.channels)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, o, k in zip(inputs, architecture.channels, architecture.kernels, strict=False):
            self.convs.append(nn.Conv2d(i, o, k, padding=k // 2, bias=False))
            self.norms.append(nn.BatchNorm2d(o))
        self.pools = architecture.pools
        self.head = nn.Linear(architecture.channels[-1], architecture.classes)

    def forward(self, x, seeds, gates, *, shadow=False):
        """Logits, given seeds and gates by slot; a shadow does not update running statistics."""
        for s, (conv, norm, pool) in enumerate(
            zip(self.convs, self.norms, self.pools, strict=True)
        ):
            x = conv(x)
            if shadow:
                x = functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
            else:
                x = norm(x)
            x = functional.max_pool2d(x.relu(), pool)
            if self.kind is not None:
                x = torch.cat([plane if c < self.kind["channels_used"][s] else 0 * plane
                               for c, plane in enumerate(x.split(1, 1))], 1)  # fmt: skip
            if gates[s] != 0:
                x = x + gates[s] * seeds[s](x)
        logits = self.head(x.mean((2, 3)))
        if self.kind is None:
            return logits
        absent = [k for k in range(logits.shape[1]) if k not in self.kind["classes"]]
        return logits.index_fill(1, torch.tensor(absent, dtype=torch.long), -math.inf)

    def fill(self, row):
        parameters = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            parameters += [conv.weight, norm.weight, norm.bias]
        fill(parameters, row)
        used = sum(p.numel() for p in parameters)
        with torch.no_grad():
            count = self.head.weight.numel()
            self.head.weight.copy_(row[used : used + count].view(-1, self.head.out_features).T)
            self.head.bias.copy_(row[used + count :])


class Slot:
    """The life cycle of a slot, with stages as words."""

    def __init__(self, spec):
        self.spec = spec
        self.stage, self.alpha, self.epochs, self.measured = "DORMANT", 0.0, 0, False
        self.blueprint, self.ramp, self.fade_from, self.age = None, 1, 0.0, 0

    def enter(self, stage, epochs=0):
        self.stage, self.epochs = stage, epochs

    @property
    def attached(self):
        return self.stage in ("BLENDING", "HOLDING", "FOSSILIZED", "FADING")

    @property
    def live(self):
        return self.attached or self.stage == "TRAINING"

    def tick(self):
        self.epochs += 1
        if self.stage == "BLENDING":
            share = min(1.0, self.epochs / self.ramp)
            self.alpha = {
                "linear": share,
                "cosine": (1 - math.cos(math.pi * share)) / 2,
                "sigmoid": (sigmoid(12 * share - 6) - sigmoid(-6)) / (sigmoid(6) - sigmoid(-6)),
            }[self.spec.ramp_shape]
            if self.epochs >= self.ramp:
                self.alpha = 1.0
                self.enter("HOLDING", 1)
        elif self.stage == "FADING":
            self.alpha = self.fade_from * max(0.0, 1 - self.epochs / self.spec.fade_epochs)
            if self.epochs >= self.spec.fade_epochs:
                self.enter("EMBARGOED", 1)
        elif self.stage == "EMBARGOED" and self.epochs > self.spec.cooldown_epochs:
            self.enter("DORMANT", 1)
        self.age += 1
        if not self.live:
            self.alpha, self.measured, self.age = 0.0, False, 0

    def observe(self, epochs):
        """Features of the slot that follow from its life cycle."""
        kind = f"blueprint_{self.blueprint}" if self.live else None
        return {
            f"stage_{self.stage.lower()}": 1.0,
            **({kind: 1.0} if kind else {}),
            "alpha": self.alpha,
            "epochs_in_stage": self.epochs / epochs,
            "age": self.age / epochs,
        }


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


class LifeCycleOracle:
    """Legal ops on the slots of one host, and the stages after them."""

    def __init__(self, spec):
        self.spec = spec
        self.slots = [Slot(spec) for _ in spec.channels]

    def legal(self, op, s):
        slot = self.slots[s]
        if op == "GERMINATE":
            busy = any(other.stage in ("TRAINING", "BLENDING") for other in self.slots)
            waited = slot.epochs >= self.spec.min_dormant_epochs
            return slot.stage == "DORMANT" and not busy and waited
        if op == "BLEND":
            return slot.stage == "TRAINING" and slot.epochs >= self.spec.min_training_epochs
        if op == "FOSSILIZE":
            return slot.stage == "HOLDING" and slot.measured
        return op == "PRUNE" and slot.stage in ("TRAINING", "BLENDING", "HOLDING")

    def act(self, op, s, blueprint, ramp):
        """Apply an op, and return whether a seed was germinated."""
        if op == "WAIT" or not self.legal(op, s):
            return False
        slot = self.slots[s]
        if op == "GERMINATE":
            slot.enter("TRAINING")
            slot.blueprint, slot.measured = self.spec.blueprints[blueprint], False
            slot.age = 0
        elif op == "BLEND":
            slot.enter("BLENDING")
            slot.ramp = self.spec.ramp_epochs[ramp]
        elif op == "FOSSILIZE":
            slot.enter("FOSSILIZED")
        elif slot.stage == "TRAINING":
            slot.enter("EMBARGOED")
        else:
            slot.fade_from = slot.alpha
            slot.enter("FADING")
        return op == "GERMINATE"

    def tick(self):
        for slot in self.slots:
            slot.tick()

    def measured(self):
        for slot in self.slots:
            slot.measured |= slot.stage in ("TRAINING", "BLENDING", "HOLDING", "FADING")


class LoneHost:
    """One environment: a module, an optimizer for the module and one for each seed."""

    def __init__(self, spec, row, dtype=torch.float32, kind=None):
        self.spec, self.life, self.kind = spec, LifeCycleOracle(spec), kind
        self.host = Host(spec.architecture(), kind).to(dtype)
        self.host.fill(row)
        self.optimizer = self._optimizer(self.host)
        self.seeds = [None] * len(spec.channels)
        self.optimizers = [None] * len(spec.channels)
        self.dtype = dtype
        self.losses, self.accuracies = [math.log(spec.classes)] * 5, [1 / spec.classes] * 5
        self.grad_norm, self.germination_accuracy = {}, {}
        self.contribution, self.judged_at = {}, {}
        self.last, self.clipped = None, set()

    def step(self, action, drawn_seed, batches, validation):
        """One epoch of the environment; ``drawn_seed`` holds the parameters of a new seed.

        Returns what ``measure`` does.
        """
        op, s, blueprint, ramp = action
        self.last = (op, s, op != "WAIT" and self.life.legal(op, s))
        if self.life.act(op, s, blueprint, ramp):
            self.germinate(s, drawn_seed)
            self.germination_accuracy[s] = self.accuracies[-1]
        self.life.tick()
        self.train(batches)
        loss, accuracy, contribution = self.measure(*validation)
        self.losses.append(loss)
        self.accuracies.append(accuracy)
        self.contribution |= contribution
        self.judged_at |= dict.fromkeys(contribution, len(self.losses))
        return loss, accuracy, contribution

    def germinate(self, s, row):
        seed = make_seed(self.life.slots[s].blueprint, self.spec.channels[s]).to(self.dtype)
        fill(ordered(seed), row)
        self.seeds[s], self.optimizers[s] = seed, self._optimizer(seed)

    def _optimizer(self, module):
        spec = self.spec
        return torch.optim.SGD(
            module.parameters(),
            lr=spec.learning_rate if self.kind is None else self.kind["learning_rate"],
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            foreach=False,
        )

    def gates(self):
        return [slot.alpha if slot.attached else 0.0 for slot in self.life.slots]

    def train(self, batches):
        """SGD over ``(image [M, C, H, W], label [M])``."""
        self.host.train()
        slots = self.life.slots
        attached = [s for s, slot in enumerate(slots) if slot.attached]
        isolated = [s for s, slot in enumerate(slots) if slot.stage == "TRAINING"]
        for image, label in batches:
            modules = [self.host, *(self.seeds[s] for s in attached)]
            parameters = [p for module in modules for p in module.parameters()]
            loss = functional.cross_entropy(self.host(image, self.seeds, self.gates()), label)
            grads = torch.autograd.grad(loss, parameters)
            by_parameter = dict(zip(parameters, grads, strict=True))
            for s in attached:
                self.grad_norm[s] = norm_of([by_parameter[p] for p in self.seeds[s].parameters()])
            for s in isolated:
                gates = self.gates()
                gates[s] = 1.0
                mine = list(self.seeds[s].parameters())
                logits = self.host(image, self.seeds, gates, shadow=True)
                shadow_loss = functional.cross_entropy(logits, label)
                found = torch.autograd.grad(shadow_loss, mine)
                self.grad_norm[s] = norm_of(found)
                self._descend("isolated", mine, found, [self.optimizers[s]])
            optimizers = [self.optimizer, *(self.optimizers[s] for s in attached)]
            self._descend("joint", parameters, grads, optimizers)

    def _descend(self, kind, parameters, grads, optimizers):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        if nn.utils.clip_grad_norm_(parameters, self.spec.max_grad_norm) > self.spec.max_grad_norm:
            self.clipped.add(kind)
        for optimizer in optimizers:
            optimizer.step()

    @torch.no_grad()
    def measure(self, image, label):
        """Loss, accuracy, and the contribution of each slot."""
        self.host.eval()
        if self.kind is not None:
            mine = [i for i, k in enumerate(label.tolist()) if k in self.kind["classes"]]
            image, label = image[mine], label[mine]

        def accuracy(gates):
            return (self.host(image, self.seeds, gates).argmax(1) == label).double().mean().item()

        logits = self.host(image, self.seeds, self.gates())
        here = (logits.argmax(1) == label).double().mean().item()
        contribution = {}
        for s, slot in enumerate(self.life.slots):
            gates = self.gates()
            if slot.stage == "TRAINING":
                gates[s] = 1.0
                contribution[s] = accuracy(gates) - here
            elif slot.attached and slot.stage != "FOSSILIZED":
                gates[s] = 0.0
                contribution[s] = here - accuracy(gates)
        self.life.measured()
        return functional.cross_entropy(logits, label).item(), here, contribution

    def observe(self):
        """Features that are not 0, by name."""
        spec, (op, last_slot, changed) = self.spec, self.last
        live = [s for s, slot in enumerate(self.life.slots) if slot.live]
        grown = sum(p.numel() for s in live for p in self.seeds[s].parameters())
        found = {
            "time": (len(self.losses) - 5) / spec.epochs,
            f"last_op_{op.lower()}": 1.0,
            f"last_slot_{last_slot}": 1.0,
            "changed": float(changed),
            "grown": grown / sum(p.numel() for p in self.host.parameters()),
        }
        for k in range(5):
            found[f"loss_{k}"] = min(5.0, self.losses[-1 - k] / math.log(spec.classes))
            found[f"accuracy_{k}"] = self.accuracies[-1 - k]
        for s, slot in enumerate(self.life.slots):
            mine = slot.observe(spec.epochs)
            if slot.live:
                mine["contribution"] = 10 * self.contribution[s]
                mine["freshness"] = 1 / (1 + len(self.losses) - self.judged_at[s])
                mine["grad_norm"] = math.log1p(self.grad_norm[s])
                mine["gain_since_germination"] = self.accuracies[-1] - self.germination_accuracy[s]
            found |= {f"slot{s}_{name}": value for name, value in mine.items()}
        return found

    def rows(self):
        """Parameters of host and seeds as rows, for comparison."""
        head = self.host.head
        parameters = []
        for conv, norm in zip(self.host.convs, self.host.norms, strict=True):
            parameters += [conv.weight, norm.weight, norm.bias]
        host = torch.cat([p.detach().flatten() for p in parameters])
        host = torch.cat((host, head.weight.detach().T.flatten(), head.bias.detach()))
        seeds = {
            s: torch.cat([p.detach().flatten() for p in ordered(seed)])
            for s, seed in enumerate(self.seeds)
            if self.life.slots[s].live
        }
        return host, seeds

    def clone(self):
        return copy.deepcopy(self)
