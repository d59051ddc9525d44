"""K and Theta of eight networks against neural-tangents 0.6.5 (jax 0.4.23, float64), as ``stax_networks.py`` prints."""

import pytest
import torch

from tests.theory.architecture.stax_networks import images
from torch_eft import theory
from torch_eft.theory.architecture.closed import ClosedKernels, Samples
from torch_eft.theory.architecture.label_maps import LabelMaps, convolution_axis, flatten_axis, window_axis
from torch_eft.theory.architecture.nodes import Add, Architecture, Data, Elementwise, Norm, Pool, Weight
from torch_eft.theory.architecture.statistics import prepare

VALUES = {
    "dense erf": (
        [0.5492971961931079, 0.12456407142863893, 0.5060747546078684],
        [1.8719904198755613, 0.34696460041971233, 1.6644577642971163],
    ),
    "conv same relu flatten": (
        [0.42417604549045373, 0.22426282827348434, 0.3280617902427396],
        [1.223728136371641, 0.3774381183159941, 0.935385370728219],
    ),
    "conv circular gelu gap": (
        [0.16589349582779653, 0.13325861658437138, 0.12316221615735881],
        [0.2851402552805884, 0.22878132837850618, 0.24615263931080994],
    ),
    "conv stride pool relu": (
        [0.3681644765074647, 0.21635309174181042, 0.2896369167447694],
        [0.9284189701880161, 0.3421190990653289, 0.748267845469704],
    ),
    "residual relu gap": (
        [0.30647724023196193, 0.2634471329354316, 0.25127644018003925],
        [0.4158893125996797, 0.3500277900405065, 0.3767865230668931],
    ),
    "layer norm gelu gap": (
        [0.22235294836670177, 0.2114063141130849, 0.23541987123515065],
        [0.3741596500538158, 0.34069800739159306, 0.4555365876819294],
    ),
    "pool leaky flatten": (
        [0.14737564585530946, 0.10511094880347188, 0.12306336795559708],
        [0.34119103790908284, 0.19506719255117258, 0.28687778731635427],
    ),
    "wide resnet erf": (
        [0.14619374614368766, 0.11480436928513596, 0.1912918642931675],
        [0.5808893009023637, 0.32920567764992575, 0.7775996441506167],
    ),
}


class Build:
    """Nodes one after another, in the parameterization of stax: lambda_W = C_W, lambda_b = C_b."""

    def __init__(self):
        self.nodes, self.sizes = [Data(2, (6, 6))], (6, 6)

    @property
    def last(self):
        return len(self.nodes) - 1

    def add(self, node, sizes=None):
        self.nodes.append(node)
        self.sizes = sizes or self.sizes
        return self

    def weight(self, maps, W, b):
        node = Weight((self.last,), 8, maps, C_W=W**2, C_b=b**2, lambda_W=W**2, lambda_b=b**2)
        return self.add(node, maps.outputs)

    def conv(self, kernel=3, stride=1, padding="same", W=1.3, b=0.2, of=None):
        sizes = self.sizes if of is None else of[1]
        axes = []
        for size in sizes:
            whole = {"valid": 0, "same": max((-(-size // stride) - 1) * stride + kernel - size, 0)}.get(
                padding, kernel - 1
            )
            pads = (whole // 2, whole - whole // 2)
            axes.append(convolution_axis(size, kernel, stride=stride, padding=pads, circular=padding == "circular"))
        maps = LabelMaps(tuple(axes))
        reads = self.last if of is None else of[0]
        self.nodes.append(Weight((reads,), 8, maps, C_W=W**2, C_b=b**2, lambda_W=W**2, lambda_b=b**2))
        self.sizes = maps.outputs
        return self

    def dense(self, W=1.2, b=0.1):
        return self.weight(LabelMaps(tuple(map(flatten_axis, self.sizes))), W, b)

    def act(self, name):
        activation = theory.leaky_relu(0.2) if name == "leaky" else theory.get_activation(name)
        return self.add(Elementwise((self.last,), activation))

    def pool(self, kernel, stride, padding=0):
        maps = LabelMaps(tuple(window_axis(n, kernel, stride=stride, padding=padding) for n in self.sizes))
        return self.add(Pool((self.last,), maps), maps.outputs)

    def gap(self):
        return self.pool(self.sizes[0], 1)

    def norm(self):
        return self.add(Norm((self.last,), over=(0, 1)))

    def block(self, name, norm=False):
        start = self.last
        for W in (1.3, 0.9):
            if norm:
                self.norm()
            self.act(name).conv(W=W)
        return self.add(Add((start, self.last)))

    def projection(self, name):
        start = self.last, self.sizes
        self.act(name).conv(stride=2).act(name).conv()
        end = self.last
        self.conv(1, 2, W=1.0, of=start)
        return self.add(Add((end, self.last)))


NETWORKS = {
    "dense erf": lambda: Build().dense().act("erf").dense().act("erf").dense(),
    "conv same relu flatten": lambda: Build().conv().act("relu").conv().act("relu").dense(),
    "conv circular gelu gap": lambda: (
        Build().conv(padding="circular").act("gelu").conv(padding="circular").act("gelu").gap().dense()
    ),
    "conv stride pool relu": lambda: (
        Build().conv(padding="valid").act("relu").pool(2, 2).conv(2, padding="valid").act("relu").dense()
    ),
    "residual relu gap": lambda: Build().conv().block("relu").act("relu").gap().dense(),
    "layer norm gelu gap": lambda: Build().conv().norm().act("gelu").conv().norm().act("gelu").gap().dense(),
    "pool leaky flatten": lambda: Build().conv().act("leaky").pool(3, 1, 1).conv(stride=2).act("leaky").dense(),
    "wide resnet erf": lambda: Build().conv().block("erf", norm=True).projection("erf").act("erf").gap().dense(),
}


@pytest.mark.parametrize("name", VALUES)
def test_kernels_are_those_of_neural_tangents(name):
    x = torch.from_numpy(images())
    architecture = Architecture(NETWORKS[name]().nodes)
    with torch.no_grad():
        found = ClosedKernels(architecture, prepare(architecture, x), Samples.all_pairs(2))
        for values, truth in zip((found.output_kernel, found.ntk()), VALUES[name], strict=True):
            assert values.tolist() == pytest.approx(truth, rel=1e-8)
